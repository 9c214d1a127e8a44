"""A signal ends a command by its own exit code, waits for a checkpoint, and is put back where it was."""

import os
import signal
import threading

import pytest

from replace.interrupt import CODE, SIGNALS, Stopped, code_of, held, stoppable

NUMBERS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_raises_with_the_code_of_shells(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, stoppable():
        os.kill(os.getpid(), number)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_a_first_signal_waits_for_the_end_of_the_block_and_a_second_does_not():
    done = []

    def work(times):
        with held() as hold:
            for _ in range(times):
                assert hold.code is None
                os.kill(os.getpid(), signal.SIGTERM)
                done.append(hold.code)

    with stoppable(), pytest.raises(Stopped) as stopped:
        work(1)
    assert done == [143]
    assert stopped.value.code == 143
    done.clear()

    def twice():
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("never")

    with stoppable(), pytest.raises(Stopped):
        twice()
    assert done == []


def test_an_error_in_the_block_is_not_replaced_by_the_signal():
    def failing():
        with held():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError

    with stoppable(), pytest.raises(ZeroDivisionError):
        failing()


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_changes_nothing():
    seen = []

    def work():
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_an_interrupt_of_python_itself_has_the_code_of_ctrl_c():
    assert code_of(KeyboardInterrupt()) == CODE == 130
    assert code_of(Stopped(code=143)) == 143
    assert Stopped().args == ()
