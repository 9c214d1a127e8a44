"""Modules of this project as flat files that import each other relatively, and none of ours by its own name.

transformers copies the file that a config names and whatever that reaches through lines `from .x import y`;
every other import it takes for a package that must be installed. So `replace/attention/infini.py` becomes
`replace_attention_infini.py`, and `from replace.mixer import Call` becomes `from .replace_mixer import Call`,
wherever in a file it stands.
"""

import ast
import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from replace.errors import UserError


@dataclass(frozen=True)
class Target:
    """What one imported name is: a name of `module`, or (where `attribute` is None) the module itself."""

    module: str
    attribute: str | None
    alias: str


def top(module: str) -> str:
    """The package that a dotted name begins with."""
    return module.partition(".")[0]


def collect(modules: Iterable[str], roots: frozenset[str]) -> dict[str, str]:
    """The sources of `modules` and of all that they import inside the packages `roots`, by dotted name.

    Raises:
        UserError: a module has no source, or imports in a form that has no flat counterpart.
    """
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in sources:
            sources[name] = source_of(name)
            for _, targets in _own_imports(name, sources[name], roots):
                waiting += [target.module for target in targets]
    return dict(sorted(sources.items()))


def flat_names(modules: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """A file name (without `.py`) for every dotted name, all different."""
    names: dict[str, str] = {}
    used = set(taken)
    for module in sorted(modules):
        flat = module.replace(".", "_")
        while flat in used:
            flat += "_"
        used.add(flat)
        names[module] = flat
    return names


def flatten(module: str, source: str, names: dict[str, str], roots: frozenset[str]) -> str:
    """The source with its imports from `roots` rewritten to the flat names."""
    lines = source.encode().splitlines(keepends=True)
    for node, targets in sorted(_own_imports(module, source, roots), key=_place, reverse=True):
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        # Statements keep the indentation of a line of their own; after `if x:` all must stay on one line.
        between = "; " if before.strip() else "\n" + before.decode()
        statement = between.join(_relative(targets, names))
        lines[first : last + 1] = [before + statement.encode() + after]
    return b"".join(lines).decode()


def _place(found: tuple[ast.stmt, list[Target]]) -> tuple[int, int]:
    return found[0].lineno, found[0].col_offset


def source_of(module: str) -> str:
    """The text of a module's file.

    Raises:
        UserError: there is no such file, as for a class that was defined in a notebook.
    """
    spec = None if module == "__main__" else importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(
            f"module {module!r} has no source file, so it cannot be exported; "
            "put its classes into an importable .py file."
        )
    return Path(spec.origin).read_text(encoding="utf-8")


@lru_cache(maxsize=1024)  # an export asks three times for each of its modules
def _own_imports(
    module: str, source: str, roots: frozenset[str]
) -> list[tuple[ast.Import | ast.ImportFrom, list[Target]]]:
    """Each import statement of a module that reaches into `roots`, with what it binds."""
    found: list[tuple[ast.Import | ast.ImportFrom, list[Target]]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            ours = [alias for alias in node.names if top(alias.name) in roots]
            if not ours:
                continue
            if len(ours) < len(node.names) or any("." in a.name and a.asname is None for a in ours):
                raise UserError(
                    f"{module}, line {node.lineno}: {ast.unparse(node)!r} cannot be exported; "
                    "write `from package.module import name`."
                )
            targets = [Target(alias.name, None, alias.asname or alias.name) for alias in ours]
            found.append((node, targets))
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            if top(base) in roots:
                found.append((node, [_target(base, alias) for alias in node.names]))
    return found


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The full name of the module that `from ... import` names."""
    if not node.level:
        return node.module or ""
    spec = importlib.util.find_spec(module)
    package = module if spec is not None and spec.submodule_search_locations else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _target(base: str, alias: ast.alias) -> Target:
    """Whether `from base import alias` means a name in `base` or a module inside it, as Python decides it."""
    bound = alias.asname or alias.name
    if alias.name == "*":
        return Target(base, "*", "*")
    found = getattr(importlib.import_module(base), alias.name, None)
    submodule = f"{base}.{alias.name}"
    if (found is None or isinstance(found, ModuleType)) and _is_module(submodule):
        return Target(submodule, None, bound)
    return Target(base, alias.name, bound)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module rather than a package
        return False


def _relative(targets: list[Target], names: dict[str, str]) -> list[str]:
    """The statements that bind `targets` from flat files."""
    statements = []
    by_module: dict[str, list[str]] = {}
    for target in targets:
        flat = names[target.module]
        if target.attribute is None:
            # transformers does not follow `from . import x`, so a line that it does follow stands before it.
            statements.append(f"from .{flat} import __name__ as _")
            statements.append(f"from . import {_bound(flat, target.alias)}")
        else:
            by_module.setdefault(flat, []).append(_bound(target.attribute, target.alias))
    return [*(f"from .{flat} import {', '.join(bound)}" for flat, bound in by_module.items()), *statements]


def _bound(name: str, alias: str) -> str:
    return name if name == alias else f"{name} as {alias}"
