"""Records of sweeps are found by themselves, the newest of each name; schedules and runs are drawn as they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nanopd_lab.bench.load import Progress
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.resources import data_dir
from nanopd_lab.router import Slo
from nanopd_lab.viz.cockpit import Cockpit
from nanopd_lab.viz.recorded_sweeps import recorded_sweeps, sweeps_view
from nanopd_lab.viz.schedule import arrivals_view, omission_view
from nanopd_lab.viz.strategies import look_of
from tests.bench.test_metrics import loaded
from tests.bench.test_request_table import result_of

NAME = "sweep-long-qwen3-8b-four-nvidia-h200"


def test_the_newest_whole_sweep_of_each_name_is_taken(tmp_path: Path) -> None:
    source = next((data_dir() / "recorded").glob(f"{NAME}-*.json"))
    for date in ("2026-01-01", "2026-03-02"):
        shutil.copy(source, tmp_path / f"{NAME}-{date}.json")
    record = json.loads(source.read_text())
    other = tmp_path / "sweep-other-x-two-nvidia-h200-2026-01-01.json"
    other.write_text(json.dumps(record | {"partial": True}))
    (found,) = recorded_sweeps(tmp_path)
    assert (found.name, found.kind, found.date, found.results) == (NAME, "long", "2026-03-02", None)
    assert found.measured() == []
    other.write_text(json.dumps(record | {"workers": 2}))
    assert [each.workers for each in recorded_sweeps(tmp_path)] == [2, 4]


def test_bars_are_the_records_figures() -> None:
    sweeps = recorded_sweeps()
    axes = sweeps_view(sweeps).axes
    for each, share in zip(sweeps, axes[::2], strict=True):
        rows = each.at(each.top_rate).values()
        wanted = sorted(row.metrics["attainment"].mean for row in rows)
        assert sorted(bar.get_width() for bar in share.patches) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="no sweep of GPUs is recorded"):
        sweeps_view([])


def test_both_clocks_and_all_arrivals_are_drawn() -> None:
    table = RequestTable.of(result_of(loaded(3), Slo(0.3, 0.1)))
    full, sent = omission_view({"run": table}).axes[0].lines
    assert (full.get_ydata() - sent.get_ydata()) / 1e3 == pytest.approx(table.late[table.completed])
    _, below = arrivals_view({"run": table}, Slo(0.3)).axes
    assert len(below.collections[0].get_segments()) == len(table)


def test_a_cockpit_counts_what_it_is_told() -> None:
    cockpit = Cockpit()
    cockpit.under("<a>")(Progress(1.5, 10, 7, 2, 4, 1))
    assert "&lt;a&gt;" in cockpit.value
    assert "7 of 10 sent, 2 running, 4 done, 1 failed" in cockpit.value


def test_splits_that_differ_look_different() -> None:
    looks = [look_of(name) for name in ("3p1d", "2p2d", "1p3d")]
    assert len({look.marker for look in looks}) == len({look.line for look in looks}) == 3
