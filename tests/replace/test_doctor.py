"""`python -m replace.doctor`: it tells what is broken and how to mend it, and survives whatever that is."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from replace.doctor import machine, packages
from replace.doctor.__main__ import examine, main
from replace.doctor.advice import precision_advice, problems
from replace.doctor.inside import in_build
from replace.doctor.packages import LIBRARIES
from replace.doctor.probes import ask, guarded
from replace.doctor.screen import screen

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
HANGING = (
    "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\ntime.sleep(600)"
)
BROKEN = {
    "xformers": "raise SystemError('built for another Python')",
    "bitsandbytes": "raise SystemExit(0)",
    "flash_attn": HANGING,
    "fla": "import os\nprint('fine', flush=True)\nos._exit(0)",
    "unsloth": "raise NotImplementedError('Unsloth cannot find any torch accelerator? You need a GPU.')",
    "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
    "triton": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "wandb": "print('x' * 10**6)\n__version__ = '9'",
}
HEALTHY = {
    "python": {"version": "3.11.7"},
    "torch": {"version": "2.13.0", "why": None, "gpus": []},
    "run": {"imports": True, "why": None},
    "places": {"cache": {"place": "~/c", "free_bytes": 10**11, "unwritable": None}},
    "memory": {"total_bytes": 10**11},
    "wandb": {"mode": "offline", "key": False},
}


def plant(folder: Path, name: str, body: str, version: str | None = None) -> None:
    """A package, and the metadata of an installed one if it has a version."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(body + "\n")
    if version is not None:
        plant_metadata(folder, name, version)


def plant_metadata(folder: Path, name: str, version: str) -> None:
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_broken_packages_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in BROKEN.items():
        plant(tmp_path, name, body, "2026.10.7" if name == "unsloth" else None)
    monkeypatch.syspath_prepend(tmp_path)
    found, began = {}, time.monotonic()
    for hang, limit in ((True, 4), (False, 300)):  # only what hangs is cut short: a busy machine is slow, too
        asked = [one for one in LIBRARIES if one.module in BROKEN and (BROKEN[one.module] == HANGING) == hang]
        monkeypatch.setattr(packages, "LIBRARIES", asked)
        found |= packages.libraries(limit=limit)
    assert time.monotonic() - began < 300
    whys = {name: one["why"] for name, one in found.items()}
    assert whys["xformers"] == "SystemError: built for another Python"
    assert whys["bitsandbytes"] == "the process ended early, with exit code 0"
    assert whys["flash_attn"] == "it did not end within 4 s"
    assert whys["fla"] == "the process ended early, with exit code 0"
    assert whys["torchvision"] == "RuntimeError: operator torchvision::nms does not exist"
    assert whys["triton"] == "the process was ended by signal 11 (SIGSEGV)"
    assert whys["wandb"] is None
    assert {name for name, one in found.items() if one["state"] == "broken"} == set(BROKEN) - {"wandb"}
    told = {problem.what: problem.mend for problem in problems(HEALTHY | {"libraries": found})}
    assert any(
        "torchvision" in what and mend == "pip uninstall -y torchvision" for what, mend in told.items()
    )
    assert any(
        what.startswith("unsloth 2026.10.7 needs a GPU") and "unsloth==2026.10.9" in mend
        for what, mend in told.items()
    )


def test_what_hangs_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'written')!r}, 'w').write(str(child.pid))\n"
        f"os.rename({str(tmp_path / 'written')!r}, {str(tmp_path / 'child')!r})\n"
        "time.sleep(600)"
    )
    plant(tmp_path, "hanging", body)
    monkeypatch.syspath_prepend(tmp_path)
    for limit in (4, 20, 100):  # a busy machine may need longer until the package has started anything
        answer = ask(packages.INSIDE, "imports", "hanging", limit=limit)
        assert answer.why == f"it did not end within {limit} s"
        if (tmp_path / "child").exists():
            break
    place = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    for _ in range(600):  # a killed orphan stays listed until it is reaped
        if not place.exists() or place.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("what a package started still runs")


def test_the_command_survives_a_broken_torch_and_tells_no_secret(tmp_path: Path) -> None:
    """All of the stack at once: torch raises, packaging does, the metadata of others are damaged."""
    plant(tmp_path, "torch", "import os\nraise SystemError('key ' + os.environ['WANDB_API_KEY'])", "2.5.0")
    plant(tmp_path, "packaging", "raise SystemError('no packaging')")
    plant_metadata(tmp_path, "kernels", "0.10.2")
    (tmp_path / "xformers-1.dist-info").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "WANDB_API_KEY": KEY,
        "WANDB_MODE": "perhaps",
        "HF_TOKEN": "hf_notforyou",
        "LAYER_REPLACE_CACHE": "/proc/nowhere",
        "LC_ALL": "C",
    }
    outputs = []
    for argument in ("json=true", "limit=300"):
        ended = subprocess.run(
            [sys.executable, "-m", "replace.doctor", argument],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=environment,
        )
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr == ""
        assert KEY not in ended.stdout
        assert "hf_notforyou" not in ended.stdout
        outputs.append(ended.stdout)
    facts = json.loads(outputs[0])
    assert facts["schema"] == 1
    assert facts["ok"] is False
    assert "version" not in facts["torch"]
    assert facts["torch"]["why"] == "SystemError: key ***"
    assert facts["failed"]["what is required"] == "SystemError: no packaging"
    assert facts["wandb"] == {"mode": "perhaps", "key": True, "why": "WANDB_MODE=perhaps"}
    told = {problem["what"]: problem for problem in facts["problems"]}
    hindering = {what for what, problem in told.items() if problem["hinders"]}
    for words, mend in (
        (
            "torch cannot be imported: SystemError: key ***",
            'pip install --force-reinstall "torch>=2.11,<2.15"',
        ),
        ("Hugging Face's package kernels 0.10.2", "pip uninstall -y kernels"),
        ("the cache /proc/nowhere cannot be written", "export LAYER_REPLACE_CACHE=<folder>"),
    ):
        (what,) = [what for what in hindering if what.startswith(words)]
        assert told[what]["mend"].startswith(mend)
    assert any(what.startswith("WANDB_MODE=perhaps is none of") for what in set(told) - hindering)
    text = outputs[1]
    assert text.isascii()
    assert "cannot be imported" in text
    assert text.rstrip().endswith("hinder a run.")
    assert len(text.splitlines()) < 70


def test_the_command_needs_the_standard_library_only(tmp_path: Path) -> None:
    """An interpreter without any package: what is missing is told, with what installs it."""
    ended = subprocess.run(
        [sys.executable, "-S", "-m", "replace.doctor", "json=true", "limit=1"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    assert ended.stderr == ""
    assert ended.returncode == 1
    facts = json.loads(ended.stdout)
    assert facts["failed"]["what is required"] == "ModuleNotFoundError: No module named 'packaging'"
    assert any(problem["hinders"] for problem in facts["problems"])


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("| true", ""),
        (">&-", ""),
        ("> /dev/full", "error: the screen cannot be written: No space left on device.\n"),
    ],
)
def test_an_output_that_takes_nothing_is_no_traceback(where: str, said: str, tmp_path: Path) -> None:
    if "full" in where and not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    ended = subprocess.run(
        f"{shlex.quote(sys.executable)} -S -m replace.doctor limit=1 {where}",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )
    assert ended.stderr == said


def test_a_healthy_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As this one is where the tests run: exit code 0, and what auto takes is what a run would."""
    monkeypatch.setattr(packages, "LIBRARIES", ())
    monkeypatch.setattr(machine, "cache_places", dict)
    monkeypatch.setattr(machine, "nvidia_gpus", list)
    monkeypatch.setenv("LAYER_REPLACE_CACHE", str(Path.home()))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert main(["json=true", "limit=300"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["failed"] == {}
    assert facts["problems"] == [problem for problem in facts["problems"] if not problem["hinders"]]
    assert set(facts) == {
        *("schema", "project", "python", "torch", "nvidia_gpus", "memory", "places", "caches", "wandb"),
        *("unmet", "kernels_package", "libraries", "run", "precision_advice", "support", "failed"),
        *("problems", "ok"),
    }
    assert facts["kernels_package"] == {"other": None, "ours": True}
    assert facts["places"]["cache"]["place"] == "~"
    import torch

    from replace.machine import device_of_choice
    from replace.precision import dtype_of

    assert facts["run"]["device"] == device_of_choice().type
    assert facts["run"]["dtype"] == str(dtype_of("auto", device_of_choice())).removeprefix("torch.")
    assert facts["torch"]["version"] == torch.__version__
    if not torch.cuda.is_available():
        assert facts["run"]["kernels"]["choice"] == "chunk"
        assert facts["run"]["softmax"]["choice"] == "flash"
        assert "efficient" in facts["run"]["softmax"]["refused"]
        assert facts["run"]["lora"]["choice"] == "peft"
    assert facts["wandb"]["mode"] == "offline"
    text = screen(facts)
    assert "Nothing hinders a run." in text
    assert max(map(len, text.splitlines())) <= 110
    assert len(text.splitlines()) < 45


@pytest.mark.parametrize(
    ("facts", "words", "mend", "hinders"),
    [
        ({"python": {"version": "3.10.4"}}, "Python 3.10.4 is older", "python3.12 -m venv", True),
        (
            {"unmet": [{"requirement": "transformers<=5.17,>=5.13", "version": "5.19.0"}]},
            "a run needs transformers<=5.17,>=5.13, and 5.19.0 is installed",
            'pip install "transformers<=5.17,>=5.13"',
            True,
        ),
        (
            {"unmet": [{"requirement": "peft>=0.18", "version": None}]},
            "it is not installed",
            'pip install "peft>=0.18"',
            True,
        ),
        (
            {"nvidia_gpus": ["Tesla T4, 580.82"]},
            "this machine has Tesla T4, 580.82, and torch is built without CUDA",
            "pip install --force-reinstall",
            False,
        ),
        (
            {"nvidia_gpus": ["Tesla T4, 470.1"], "torch": {"version": "2.13.0", "cuda": "13.0", "why": None}},
            "the driver may be too old",
            "pip install --force-reinstall",
            False,
        ),
        (
            {
                "torch": {
                    "version": "2.13.0",
                    "why": None,
                    "gpus": [{"name": "Tesla P40", "architecture": "sm_61", "in_this_build": False}],
                }
            },
            "torch 2.13.0 has no code for Tesla P40 (sm_61)",
            "CUDA_VISIBLE_DEVICES= python",
            True,
        ),
        (
            {"places": {"cache": {"place": "~/c", "free_bytes": 5 * 10**8, "unwritable": None}}},
            "the cache ~/c has 0.5 GB free, and a run needs 1",
            "export LAYER_REPLACE_CACHE=<folder>, a folder with 1 GB free",
            True,
        ),
        (
            {"places": {"here": {"place": "/", "free_bytes": 10**11, "unwritable": "Read-only file system"}}},
            "this folder, where outputs/ goes, cannot be written (Read-only file system)",
            "python -m replace +exp=infini hydra.run.dir=<folder>",
            True,
        ),
        ({"memory": {"total_bytes": 4 * 10**9}}, "4.0 GB of memory", "python -m replace +exp=infini", False),
        (
            {"wandb": {"mode": "online", "key": False}},
            "WANDB_MODE=online without",
            "export WANDB_MODE",
            False,
        ),
        (
            {"kernels_package": {"other": "0.9", "ours": False}},
            "Hugging Face's package kernels 0.9",
            "pip uninstall -y kernels && pip install --force-reinstall --no-deps -e .",
            True,
        ),
        (
            {"run": {"why": "SystemError: bad"}},
            "a run's code cannot be imported: SystemError: bad",
            "pip install --force-reinstall",
            True,
        ),
        (
            {
                "libraries": {"torchvision": {"state": "broken", "version": "1", "why": "x"}},
                "run": {"why": "y"},
            },
            "torchvision 1 does not fit this torch: x",
            "pip uninstall -y torchvision",
            True,
        ),
        (
            {"failed": {"what is required": "ImportError: no"}},
            "it could not be found",
            "pip install -c",
            False,
        ),
        ({"failed": {"memory": "OSError: no"}}, "it could not be found out: memory (OSError: no)", "", False),
    ],
)
def test_every_problem_has_the_command_that_mends_it(
    facts: dict, words: str, mend: str, hinders: bool
) -> None:
    assert problems(HEALTHY) == []
    (problem,) = problems(HEALTHY | facts)
    assert words in problem.what
    assert problem.mend.startswith(mend)
    assert problem.hinders is hinders


def test_what_is_required_is_what_the_project_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages.unmet() == []
    versions = {"torch": "2.10.0", "transformers": "5.17.0"}
    monkeypatch.setattr(packages, "version_of", lambda name: versions.get(name, "999"))
    found = {unmet["requirement"]: unmet["version"] for unmet in packages.unmet()}
    assert found["torch<2.15,>=2.11"] == "2.10.0"
    assert not any(name.startswith("transformers") for name in found)
    assert found["datasets<5,>=4"] == "999"


def test_precision_follows_the_gpu() -> None:
    ampere, turing = {"bf16": True, "name": "A100"}, {"bf16": False, "name": "T4"}
    assert precision_advice({"torch": {"gpus": [ampere]}}).startswith("bf16")
    assert precision_advice({"torch": {"gpus": [turing]}}).startswith("fp16 with loss scaling")
    assert precision_advice({"torch": {}}).startswith("fp32")


@pytest.mark.parametrize(
    ("capability", "built", "has"),
    [
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((8, 9), ["sm_80", "sm_86"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((6, 1), ["sm_75", "compute_75"], False),
        ((9, 4), ["gfx90a"], False),
    ],
)
def test_whether_a_build_has_code_for_a_gpu(capability: tuple[int, int], built: list[str], has: bool) -> None:
    assert in_build(capability, built) is has


def test_secrets_and_the_home_folder_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "swordfish")
    monkeypatch.setenv("SHORT_KEY", "a")
    home = str(Path.home())
    told = {"why": [f"swordfish at {home}/x and {home}", "https://me:word@index.test/simple", 3, None]}
    assert machine.without_secrets(told) == {
        "why": ["*** at ~/x and ~", "https://***@index.test/simple", 3, None]
    }
    assert machine.tilde(f"{home}er") == f"{home}er"


def test_the_guard_keeps_the_reason() -> None:
    failed: dict[str, str] = {}
    assert guarded("a thing", lambda: 1 // 0, 7, failed) == 7
    assert failed == {"a thing": "ZeroDivisionError: integer division or modulo by zero"}


def test_a_cache_is_counted_and_a_large_one_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    counted = machine.size_of(tmp_path)
    assert counted["whole"] is True
    assert 1000 <= counted["bytes"] < 1500
    monkeypatch.setattr(machine, "WALK", -1.0)
    assert machine.size_of(tmp_path)["whole"] is False
    assert machine.size_of(tmp_path / "nowhere") == {
        "place": machine.tilde(str(tmp_path / "nowhere")),
        "bytes": 0,
        "whole": True,
    }


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("fast", "argument='fast' is not possible; allowed: json=true or limit=<seconds>."),
        ("json=perhaps", "json='perhaps' is not possible; allowed: one of true, false."),
        ("limit=-1", "limit='-1' is not possible; allowed: a number of seconds above 0."),
        ("limit=nan", "limit='nan' is not possible"),
    ],
)
def test_bad_input_is_one_sentence(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith(f"error: {said}")


def test_an_interrupt_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("replace.doctor.__main__._asked", lambda *_: {})
    monkeypatch.setattr(machine, "python_facts", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "error: interrupted; nothing was changed.\n"


def test_whatever_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("replace.doctor.__main__._asked", broken)
    for name in ("python_facts", "memory_facts", "nvidia_gpus", "place_facts", "size_of", "wandb_facts"):
        monkeypatch.setattr(machine, name, broken)
    for name in ("version_of", "unmet", "kernels_facts", "libraries"):
        monkeypatch.setattr(packages, name, broken)
    facts = examine()
    assert len(facts["failed"]) == 12
    assert facts["ok"] is False
    assert "it could not be found out" in screen(facts)
