"""A search ends where the workload cannot tell rates apart, and nowhere else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.bench.capacity import MOST, find_capacity
from nanopd_lab.bench.climb import Served, climb
from nanopd_lab.cli import main


@given(st.floats(0.1, 1e3), st.floats(0.1, 1.0), st.floats(0.01, 1e3), st.booleans())
@settings(deadline=None, max_examples=200)
def test_where_a_rate_is_too_high_it_finds_what_bisection_finds(
    capacity: float, share: float, start: float, keeps_coming: bool
) -> None:
    """A queue that completes at most `capacity` a second, and is in time up to some share of that."""

    def serve(rate: float) -> Served:
        requests = max(100, math.ceil(30 * rate)) if keeps_coming else 100
        return Served(rate, requests, min(rate, capacity), float(rate <= share * capacity))

    found = climb(serve, 0.9, start, 0.05, 30.0 if keeps_coming else 0.0)
    assert found == find_capacity(lambda rate: serve(rate).attainment, 0.9, start, 0.05)
    assert found.above <= 1.05 * found.rate
    assert not found.reason


@given(st.floats(0.1, 1e3), st.floats(0.01, 10.0))
@settings(deadline=None, max_examples=100)
def test_requests_that_keep_coming_end_it_soon_behind_what_is_completed(
    capacity: float, start: float
) -> None:
    asked: list[Served] = []

    def serve(rate: float) -> Served:
        asked.append(Served(rate, math.ceil(30 * rate), min(rate, capacity), 1.0))
        return asked[-1]

    found = climb(serve, 0.9, start, min_duration_s=30.0)
    assert found.above == math.inf
    assert found.rate <= max(4 * capacity, 2 * start)
    assert f"{asked[-1].requests} requests in 30 s" in found.reason


def test_a_given_number_of_requests_ends_it_only_if_all_at_once_are_in_time() -> None:
    """Where answers take long the completions rise little with the rate; their beginnings may still come late."""

    def serve(rate: float, limit: float) -> Served:
        return Served(rate, 20, 20 / (20 / rate + 60), float(rate <= limit))

    late = climb(lambda rate: serve(rate, 50.0), 0.9)
    assert late.rate <= 50 < late.above <= 1.05 * late.rate
    never = climb(lambda rate: serve(rate, MOST), 0.9)
    assert (never.rate, never.above) == (MOST, math.inf)
    assert "all 20 requests at once are in time" in never.reason


def test_a_trace_that_has_no_more_requests_ends_it() -> None:
    found = climb(
        lambda rate: Served(rate, min(50, math.ceil(30 * rate)), min(rate, 5.0), 1.0), 0.9, 1.0, 0.05, 30.0
    )
    assert "all 50 requests at once" in found.reason


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--goodput", "ttft:60000", "--min-duration", "0"], "all 20 requests at once are in time"),
        (["--goodput", "tpot:200", "--min-duration", "2"], "requests in 2 s are in time although only"),
    ],
)
def test_the_command_names_the_limit_and_the_way_out(
    flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    brief = tmp_path / "brief.json"
    common = [
        "sweep",
        "--simulate",
        "--workers",
        "2",
        "--policies",
        "collocated",
        "--seeds",
        "0",
        "--num-prompts",
        "20",
    ]
    assert main([*common, "--search", "0.9", "--summary-filename", str(brief), *flags]) == 0
    out = capsys.readouterr().out
    assert "collocated: 90% in time at every rate tried" in out
    assert reason in out
    assert "--goodput" in out
    record = json.loads(brief.read_text(), parse_constant=pytest.fail)
    (found,) = record["search"]["collocated"]
    assert found["above"] is None
    assert reason in found["reason"]
    assert len(record["rows"]) < 15  # the rates that were tried
