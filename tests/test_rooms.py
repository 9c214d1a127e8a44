"""Imports go one way: kernels <- replace <- distill, eval <- the entry points."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "kernels": {"kernels"},
    "replace": {"replace", "kernels"},
    "distill": {"distill", "replace", "kernels"},
    "eval": {"eval", "replace", "kernels"},
}
ROOMS = set(MAY_IMPORT) | {"conf", "tests"}
# Only these see everything: the commands, and the one function that is a run from top to bottom.
ENTRY_POINTS = {"replace/__main__.py", "replace/pipeline.py", "replace/reproduce.py", "eval/__main__.py"}
FILES = sorted(str(path.relative_to(ROOT)) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def imported(file: str, root: Path = ROOT) -> Iterator[str]:
    """Every module that a file imports, at its top or inside a function, by full name."""
    package = file.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, node.module or ""])


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file: str) -> None:
    if file in ENTRY_POINTS:
        pytest.skip("an entry point sees every room")
    room = file.partition("/")[0]
    for module in imported(file):
        top = module.partition(".")[0]
        assert top not in ROOMS or top in MAY_IMPORT[room], f"{file} imports {module}"
        assert module.replace(".", "/") + ".py" not in ENTRY_POINTS, (
            f"{file} imports the entry point {module}"
        )


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("kernels/")])
def test_kernels_need_torch_and_triton_only(file: str) -> None:
    for module in imported(file):
        top = module.partition(".")[0]
        assert top not in {"transformers", "hydra", "omegaconf", "accelerate", "datasets", "peft"}, (
            f"{file}: {module}"
        )


@pytest.mark.parametrize("file", FILES)
def test_nothing_says_import_eval(file: str) -> None:
    """`import eval` would hide the builtin; `from eval.x import y` does not."""
    assert "eval" not in set(imported(file))


def test_the_reader_sees_relative_and_nested_imports(tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "x.py").write_text(
        "from .y import a\ndef f():\n    from distill.z import b\n    import os.path\n"
    )
    assert list(imported("eval/x.py", tmp_path)) == ["eval.y", "distill.z", "os.path"]
