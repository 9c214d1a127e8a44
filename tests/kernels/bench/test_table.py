"""The README's performance table is that of the CSVs that are kept, to the letter."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels.bench import record
from kernels.bench.__main__ import main
from kernels.bench.cells import Cell
from kernels.bench.table import put_into, table

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "kernels" / "bench" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKED = re.findall(r"<!-- performance: (\S+) -->", README)


@pytest.fixture
def rows(cell: Callable[..., Cell]) -> list[record.Row]:
    cells = [
        cell("copy", "torch", "forward", 4096, [1.0]),
        cell("x", "chunk", "decode", 1024, [2e-6]),
        cell("x", "chunk", "forward", 1024, [4.096e-3]),
        cell("x", "chunk", "forward", 2048, [8.192e-3]),
        cell("x", "fla", "forward", 2048, [], note="wrong: output"),
    ]
    return record.rows(cells, record.Place("a device", "torch 2", "abc"))


def test_a_table_gives_microseconds_a_token(rows: list[record.Row]) -> None:
    assert table(rows) == [
        "a device, torch 2, commit abc; float32, 2 heads of 64, 4,096 tokens a call, medians.",
        "",
        "| µs a token | | T = 1,024 | T = 2,048 |",
        "|---|---|---|---|",
        "| forward | `x`, chunk | 1 | 2 |",
        "| forward | `x`, fla |  | wrong |",
        "| one token after T | `x`, chunk | 2 |  |",
    ]


def test_a_table_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    text = "a\n<!-- performance: x.csv -->\nold\n<!-- performance ends -->\nb\n"
    new = put_into(text, "x.csv", ["| t |"])
    assert new == "a\n<!-- performance: x.csv -->\n\n| t |\n\n<!-- performance ends -->\nb\n"
    assert put_into(new, "x.csv", ["| t |"]) == new
    with pytest.raises(ValueError, match=r"no line <!-- performance: y\.csv -->"):
        put_into(text, "y.csv", [])


def test_the_command_writes_the_table_into_a_file(
    rows: list[record.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record.write(tmp_path / "x.csv", rows)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- performance: x.csv -->\n<!-- performance ends -->\n")
    assert main(["--table", str(tmp_path / "x.csv")]) == 0
    printed = capsys.readouterr().out
    assert main(["--table", str(tmp_path / "x.csv"), "--into", str(readme)]) == 0
    assert printed.strip() in readme.read_text()


@pytest.mark.parametrize("name", sorted({*MARKED, *(path.name for path in RESULTS.glob("*.csv"))}))
def test_the_readme_holds_the_table_of_every_kept_result(name: str) -> None:
    """A mark whose result is not there yet says so."""
    kept = record.read(RESULTS / name) if (RESULTS / name).exists() else []
    assert put_into(README, name, table(kept)) == README
    assert not kept or (RESULTS / name).with_suffix(".png").exists()


def test_the_readme_has_a_place_for_a_cpu() -> None:
    assert "cpu.csv" in MARKED


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--fast"], "unrecognized arguments: --fast."),
        (["--table", "nowhere.csv"], "nowhere.csv cannot be read or written: No such file or directory."),
        (["--into", "README.md"], "--into is for --table."),
        (["--table", str(ROOT / "README.md")], "README.md is not a CSV of this benchmark"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
