"""The simulator's speed is measured of the command itself, in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanopd_lab.bench.simulator import SCHEMA, Cell, measure
from nanopd_lab.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_cells_are_commands() -> None:
    cell = Cell.parse("20:2:1p1d")
    assert cell == Cell(20, 2, "1p1d")
    assert cell.flags[-2:] == ["--request-rate", "5.0"]
    for text in ("20:2", "0:2:1p1d", "some:2:1p1d"):
        with pytest.raises(ValueError, match="requests:workers:policy"):
            Cell.parse(text)


def test_the_command_says_what_a_cell_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench-simulator", "--cells", "5:0:1p1d"])
    assert "'5:0:1p1d' is no cell; write requests:workers:policy" in capsys.readouterr().err


def test_what_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="needs 1 \\+ 2 workers"):
        measure(Cell(5, 2, "1p2d"), ROOT)


def test_checkouts_are_timed_side_by_side(tmp_path: Path) -> None:
    target = tmp_path / "speed.json"
    flags = ["--cells", "5:2:1p1d", "--rounds", "1", "--beside", f"again={ROOT}"]
    assert main(["bench-simulator", *flags, "--result-filename", str(target)]) == 0
    record = json.loads(target.read_text())
    assert record["schema"] == SCHEMA
    assert set(record["cells"][0]["runs"]) == {"here", "again"}
    run = record["cells"][0]["runs"]["here"][0]
    assert run["cpu_s"] > 0
    assert run["peak_bytes"] > 10e6  # an interpreter with a package
    assert str(ROOT) not in target.read_text()
