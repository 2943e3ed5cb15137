"""Studies of fleets: controllers' times, the queue's formula, rows that do not depend on who computed them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.bench.fleet.cells import FleetCell, controller_wait_s, run_cell
from nanopd_lab.bench.fleet.cli import PARTS
from nanopd_lab.bench.fleet.controller_time import ControllerTimes, Point, measure
from nanopd_lab.bench.fleet.record import controllers, load, times_of
from nanopd_lab.bench.fleet.study import Section, run_section, sections
from nanopd_lab.cli import main
from nanopd_lab.router import Slo
from nanopd_lab.sim.failures import FailureRate
from nanopd_lab.sim.shard import ControllerTime

POINTS = [
    Point(8, "adaptive", 1e-4, 1e-5, 3.0, 1.0),
    Point(64, "adaptive", 4e-4, 2e-5, 3.0, 1.0),
    Point(1024, "adaptive", 1.6e-3, 2e-5, 3.0, 1.0),
]


def test_times_lie_between_those_measured() -> None:
    busy = ControllerTimes(POINTS[::-1]).of("adaptive")
    for point in POINTS:
        assert busy(point.workers) == pytest.approx((point.decision_s, point.message_s))
    assert busy(256).decision_s == pytest.approx(8e-4)  # halfway from 64 to 1,024 by factors, and so the time
    assert busy(2) == busy(8)
    with pytest.raises(ValueError, match="largest that was measured has 1024"):
        busy(1025)
    with pytest.raises(ValueError, match="'half' was measured; choose adaptive"):
        ControllerTimes(POINTS).of("half")
    with pytest.raises(ValueError, match="simulate-fleet --measure"):
        ControllerTimes([])


@given(st.integers(8, 1024), st.integers(8, 1024))
def test_more_workers_never_take_less_time_where_the_points_say_so(one: int, other: int) -> None:
    busy = ControllerTimes(POINTS).of("adaptive")
    low, high = sorted((one, other))
    assert busy(low).decision_s <= busy(high).decision_s * (1 + 1e-12)


def test_a_controller_is_measured_with_jobs_on_its_workers() -> None:
    found = measure((4, 12), ("least-loaded", "adaptive"), rounds=2, decisions=30, warm_s=0.5)
    assert [(point.workers, point.policy) for point in found] == [
        (4, "least-loaded"), (4, "adaptive"), (12, "least-loaded"), (12, "adaptive"),
    ]  # fmt: skip
    for point in found:
        assert point.decision_s > 0
        assert point.message_s > 0
        assert 2 < point.messages_per_request < 9
        assert point.jobs > 0
        assert [each.decisions for each in point.rounds] == [30, 30]
        assert Point.of(json.loads(json.dumps(point.record()))) == point


def test_the_queue_in_front_of_a_controller_is_as_long_as_the_formula_says() -> None:
    """Requests behind messages (Cobham); messages come more evenly than at random, so a little less."""
    assert controller_wait_s(500.0, ControllerTime(1e-3), 0) == pytest.approx(0.5e-3)  # M/D/1 at load 0.5
    assert controller_wait_s(1000.0, ControllerTime(1e-3), 0) is None
    cell = FleetCell(200, rate=5.0, seconds=6.0, busy=ControllerTime(4e-4, 1e-4))
    figures = run_cell(cell)
    assert figures["controller_load"] == pytest.approx(0.7, rel=0.02)
    assert figures["mean_wait_s"] == pytest.approx(figures["formula_wait_s"], rel=0.25)


def test_a_saturated_controller_keeps_no_promise_and_dividing_it_mends_that() -> None:
    cell = FleetCell(
        64, rate=4.0, seconds=4.0, warm_s=2.0, busy=ControllerTime(0.01)
    )  # 256 requests/s, 100 taken
    one, four = run_cell(cell), run_cell(replace(cell, shards=4))
    assert one["controller_load"] == pytest.approx(2.56, rel=0.01)
    assert one["formula_wait_s"] is None
    assert one["in_time"] == 0
    assert one["censored"] > 0
    assert four["in_time"] > 0.95


def test_failures_cost_tokens_that_are_computed_again() -> None:
    cell = FleetCell(32, 4, rate=5.0, failures=FailureRate(accelerate=2e7, restart_s=0.5))
    figures = run_cell(cell)
    assert figures["failures"] > 3
    assert figures["lost_tokens"] > 0
    assert figures["retried_requests"] > 0
    assert figures["retried_tokens"] > 0
    quiet = run_cell(replace(cell, failures=None))
    assert (quiet["failures"], quiet["lost_tokens"], quiet["retried_tokens"]) == (0, 0, 0)
    assert quiet["in_time"] >= figures["in_time"]


def test_rows_do_not_depend_on_the_number_of_processes() -> None:
    section = Section(
        (FleetCell(16, 2, rate=3.0, seconds=1.0), FleetCell(16, 4, rate=6.0, seconds=1.0)), seeds=2
    )
    rows = [run_section(section, jobs) for jobs in (1, 2)]
    for each in (row for found in rows for row in found):
        assert each.pop("cpu_s") >= 0
        assert len(each["in_time_by_seed"]) == 2
    assert rows[0] == rows[1]
    assert [row["settings"]["shards"] for row in rows[0]] == [2, 4]


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fleet.json"
    flags = ["--workers", "16", "--shards", "1", "4", "--policies", "least-loaded", "--request-rates", "3"]
    more = ["--seconds", "1", "--nic-gbit", "400", "--accelerate", "1e6", "--jobs", "1"]
    assert main(["simulate-fleet", *flags, *more, "--instant", "--result-filename", str(path)]) == 0
    rows = load(path)["parts"]["fleet"]["rows"]
    told = capsys.readouterr().out
    for row in rows:
        assert f"{row['in_time']:7.1%}" in told
    assert [row["settings"]["shards"] for row in rows] == [1, 4]
    assert load(path)["controllers"] == []
    assert main(["simulate-fleet", *flags, "--front-door", "best"]) == 2
    assert "front door 'best'; choose one of random" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--workers", "0"], "workers is 0; a fleet needs at least 1"),
        (["--workers", "-3", "--shards", "1"], "workers is -3; a fleet needs at least 1"),
        (["--workers", "8", "--shards", "0"], "0 shards of 8 workers; give one shard or more"),
        (["--workers", "8", "--shards", "9"], "9 shards of 8 workers"),
        (["--workers", "8", "--shards", "1", "--request-rates", "inf"], "rate inf, 2.0 s"),
        (
            ["--workers", "1", "--shards", "1", "--request-rates", "2.4", "--seconds", "1", "--warm", "0.95"],
            "none of 2 requests of 1 workers at 2.4 requests/s",
        ),
        (["--workers", "8", "--shards", "1", "--failover", "nan"], "failover_s is nan"),
        (["--workers", "8", "--shards", "1", "--controller-dies", "-1", "2"], "dies at -1 s"),
        (["--measure", "--sizes", "8", "0"], "sizes has 0; a controller to measure has at least 1 worker"),
    ],
)
def test_the_command_names_what_is_wrong(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate-fleet", "--jobs", "1", "--policies", "least-loaded", *flags]) == 2
    assert told in capsys.readouterr().err


def test_a_file_of_somebody_else_is_refused_and_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.json"
    for content in ("my notes", "[1]", '{"mine": 1}'):
        path.write_text(content)
        assert (
            main(["simulate-fleet", "--workers", "8", "--shards", "1", "--result-filename", str(path)]) == 2
        )
        assert "mine.json" in capsys.readouterr().err
        assert path.read_text() == content


def test_the_record_is_whole_and_shows_what_is_told_of_it() -> None:
    record = load()
    assert set(PARTS) <= set(record["parts"])
    points = controllers(record)
    assert {point.workers for point in points} == {8, 64, 256, 1024, 10_000}
    every = sections(times_of())
    for name, section in every.items():
        assert len(record["parts"][name]["rows"]) == len(section.cells)
        assert Slo.parse(record["parts"][name]["slo"].split()).given
    for row in record["parts"]["saturation-1000"]["rows"]:
        if row["controller_load"] < 0.5:
            assert row["in_time"] > 0.95
        if row["controller_load"] > 2:
            assert row["in_time"] < 0.5
