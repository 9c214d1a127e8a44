"""The distribution: beside Hugging Face's `kernels`, what importing it costs, what a wheel holds."""

import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = ("torch", "transformers", "triton", "hydra", "wandb", "datasets", "lm_eval", "matplotlib")


def in_a_fresh_process(code: str) -> str:
    """What a new interpreter prints; it must end well and say nothing on its error stream."""
    command = [sys.executable, "-W", "error::ImportWarning", "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_the_version_is_below_what_transformers_takes_for_its_own_kernels() -> None:
    assert Version(PROJECT["version"]) < Version("0.9.0")
    assert Version(importlib.metadata.version("layer-replace")) < Version("0.9.0")


def test_transformers_imports_beside_our_kernels_and_does_not_use_them() -> None:
    code = (
        "import kernels, transformers\n"
        "from transformers.utils import is_kernels_available\n"
        "from transformers import AutoModelForCausalLM\n"
        "assert not hasattr(kernels, '__version__')\n"
        "print(is_kernels_available(), kernels.__file__)"
    )
    said, file = in_a_fresh_process(code).split()
    assert said == "False"
    assert Path(file) == ROOT / "kernels" / "__init__.py"


@pytest.mark.parametrize("room", ["kernels", "replace", "distill", "eval", "conf"])
def test_importing_a_room_brings_nothing_heavy(room: str) -> None:
    loaded = in_a_fresh_process(
        f"import sys\nimport {room}\nprint([n for n in {HEAVY!r} if n in sys.modules])"
    )
    assert loaded == "[]"


def test_the_command_line_is_read_before_torch_is_loaded() -> None:
    code = (
        "import sys\nfrom replace.__main__ import main\n"
        "code = main(['+exp=infini', 'attention.block=0'])\n"
        "sys.stderr.close()\n"
        "print(code, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ended.stdout.split() == ["2", "False"]


def test_the_constraints_fit_the_requirements() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            requirement = Requirement(line)
            (only,) = requirement.specifier
            assert only.operator == "==", line
            pinned[requirement.name.lower().replace("_", "-")] = only.version
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        if name not in ("pip", "triton"):  # the environment's, and torch's where it is built for a GPU
            assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"


def test_the_issue_s_dependencies_are_plain_ones() -> None:
    plain = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert {
        "torch",
        "transformers",
        "accelerate",
        "peft",
        "hydra-core",
        "wandb",
        "einops",
        "lm-eval",
    } <= plain
    assert {"test"} <= set(PROJECT["optional-dependencies"])


@pytest.mark.slow
def test_a_wheel_holds_every_config_and_no_test(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml")} <= names
    assert not [name for name in names if name.startswith("tests/")]
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = f"import sys\nsys.path.insert(0, {str(target)!r})\nfrom replace.compose import CONF, compose\n"
    code += "print(CONF); print(compose(['+exp=infini']).experiment)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert said.stdout.split() == [str(target / "conf"), "infini"]
