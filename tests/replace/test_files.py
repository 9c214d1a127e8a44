"""A write is whole or not there."""

import os
import stat

import pytest
from safetensors import SafetensorError

from replace.errors import UserError
from replace.files import atomic_folder, atomic_write, clear


def test_files_and_folders_can_be_read_by_whom_the_user_lets(tmp_path):
    mask = os.umask(0o022)
    try:
        atomic_write(tmp_path / "a.txt", "text")
        with atomic_folder(tmp_path / "b") as folder:
            atomic_write(folder / "c.txt", b"bytes")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SafetensorError])
def test_a_failed_folder_leaves_what_was_there(tmp_path, error):
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "old").touch()

    def failing():
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "new").touch()
            raise error("no space left on device")

    with pytest.raises(UserError if error is SafetensorError else error):
        failing()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["old"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a.txt", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("kind", [SafetensorError, Exception])
def test_a_full_disk_is_an_error_of_the_system_whoever_says_so(tmp_path, kind):
    def failing():
        with atomic_folder(tmp_path / "b"):
            raise kind("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as error:
        failing()
    assert (error.value.errno, error.value.filename) == (28, str(tmp_path / "b"))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_cleared(tmp_path, monkeypatch):
    """While it wrote a file or a folder, and between the two renames of a folder that is replaced."""
    run = tmp_path / "run"
    atomic_write(run / ".hydra" / "config.yaml", "kept")

    def killed(*given):
        raise SystemExit

    with monkeypatch.context() as patched:  # nothing is tidied up after a kill
        patched.setattr("pathlib.Path.unlink", lambda *given, **named: None)
        patched.setattr("shutil.rmtree", lambda *given, **named: None)
        patched.setattr(os, "replace", killed)
        for write in (lambda: atomic_write(run / "a.json", "new"), lambda: folder(run / "b")):
            with pytest.raises(SystemExit):
                write()
    folder(run / "c")
    (run / "c").rename(run / ".c.old")
    folder(run / "d")
    folder(run / ".d.old")
    assert len(list(run.iterdir())) == 6
    clear(run)
    assert sorted(path.name for path in run.iterdir()) == [".hydra", "c", "d"]
    assert (run / "c" / "deep" / "inside").read_text() == "c"
    assert (run / ".hydra" / "config.yaml").read_text() == "kept"


def folder(path):
    """A folder with a file in it, written as a checkpoint is."""
    with atomic_folder(path) as temporary:
        atomic_write(temporary / "deep" / "inside", path.name)
