"""Nothing that is read here can run code: no pickle in any form, no code of a model without leave."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    str(path.relative_to(ROOT))
    for room in ("kernels", "replace", "distill", "eval", "conf", "tests")
    for path in (ROOT / room).rglob("*.py")
)
RUNNING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
ALLOWED = {"tests/eval/test_main.py": {"pickle"}}
"""Writes one, to show that it is refused."""


def violations(source: str) -> list[str]:
    """What in a module's source could unpickle, line by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in RUNNING]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").partition(".")[0] in RUNNING else []
            found += [f"{node.module}.load" for a in node.names if (node.module, a.name) == ("torch", "load")]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called == "torch.load" and given.get("weights_only") != "True":
                found.append("torch.load without weights_only=True")
            if given.get("weights_only", "True") != "True" or given.get("allow_pickle", "False") != "False":
                found.append(f"{called} that may unpickle")
            if called.endswith(("read_pickle", "hub.load", "torch.jit.load", "load_state_dict_from_url")):
                found.append(called)
            # Weights are in safetensors or GGUF; without a word transformers also takes a pickle.
            weights = called.endswith(".from_pretrained") and "dtype" in given
            if weights and given.get("use_safetensors") != "True" and "gguf_file" not in given:
                found.append(f"{called} without use_safetensors=True")
            if given.get("trust_remote_code") == "True":
                found.append(f"{called} with trust_remote_code=True")
    return found


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_unpickled(file: str) -> None:
    found = violations((ROOT / file).read_text(encoding="utf-8"))
    if file.startswith("tests/"):  # exports are loaded there as a user does, with their own code
        found = [one for one in found if "trust_remote_code" not in one and "use_safetensors" not in one]
    assert set(found) <= ALLOWED.get(file, set())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import joblib.numpy_pickle",
        "from torch import load",
        "torch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=allowed)",
        "np.load('x', allow_pickle=True)",
        "pandas.read_pickle('x')",
        "torch.hub.load('x', 'y')",
        "Auto.from_pretrained('x', dtype=d)",
        "Auto.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_reader_sees_it(line: str) -> None:
    assert violations(line)


def test_the_reader_lets_the_safe_forms_pass() -> None:
    assert not violations("torch.load('x', weights_only=True)\nnp.load('x')\nload_file('x')")
    assert not violations("Auto.from_pretrained('x', dtype=d, use_safetensors=True, trust_remote_code=cfg.t)")
