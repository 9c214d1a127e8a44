"""Sections of the report that belong to one measurement each: a file here, no edit elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from matplotlib.figure import Figure

from eval.metrics import PHASES
from replace.registry import Registry


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        title: its heading.
        key: the place in a phase's dict that it is about.
        text: (phases, the phases it is about in order) -> Markdown.
        pictures: file name -> its text alternative, and what draws it from the same two arguments; that may
            raise `eval.plots.NotMeasured`.
    """

    title: str
    key: str
    text: Callable[[dict, list[str]], str]
    pictures: Mapping[str, tuple[str, Callable[[dict, list[str]], Figure]]] = field(default_factory=dict)


SECTIONS: Registry[Section] = Registry("section", "eval.sections")


def shown(phases: dict, key: str) -> list[str]:
    """The teacher and the last student phase, as far as they have a figure of that key."""
    student = [name for name in reversed(PHASES) if name != "teacher" and name in phases][:1]
    return [name for name in ("teacher", *student) if (phases.get(name) or {}).get(key)]


def pictures(phases: dict) -> dict[str, Callable[[], Figure]]:
    """File name -> what draws it, for `eval.plots.draw_all`."""
    found: dict[str, Callable[[], Figure]] = {}
    for section in map(SECTIONS.get, SECTIONS.names()):
        names = shown(phases, section.key)
        for file, (_, draw) in section.pictures.items() if names else ():
            found[file] = partial(draw, phases, names)
    return found


def written(phases: dict, drawn: Mapping[str, str | None]) -> list[str]:
    """The sections whose figures were measured, as Markdown."""
    texts = []
    for section in map(SECTIONS.get, SECTIONS.names()):
        names = shown(phases, section.key)
        if names:
            lines = [f"## {section.title}", section.text(phases, names)]
            for file, (title, _) in section.pictures.items():
                why = drawn.get(file, "it was not drawn")
                lines.append(f"![{title}](plots/{file})" if why is None else f"{title}: not measured: {why}")
            texts.append("\n\n".join(lines))
    return texts


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
