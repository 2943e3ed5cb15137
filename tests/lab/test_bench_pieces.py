"""What notebook 09's exercises write is what runs are made of and judged by."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab import lab
from nanopd_lab.bench.goodput import outcomes_of
from nanopd_lab.lab import Session
from nanopd_lab.router import Role, Slo, create_policy
from nanopd_lab.sim import LinearTime, SimRequest, Simulator
from tests.lab.wrong_versions import RIGHT, WRONG

PIECES = ("bench.arrivals", "bench.goodput")


def test_they_are_notebook_09s_and_part_of_nothing() -> None:
    found = [each for each in lab.all_exercises() if each.notebook == "09"]
    assert [each.name for each in found] == list(PIECES)
    assert all(each.carrier is None for each in found)


@pytest.mark.parametrize("place", [0, 1])
def test_they_are_kept_come_back_and_judge_a_run(place: int, tmp_path: Path) -> None:
    session = Session(mode="learner", folder=tmp_path / "kept")
    for name in PIECES:
        session.exercise(name, RIGHT[name][place])
        session.check(name)
    session.save()
    again = Session(mode="learner", folder=tmp_path / "kept")
    assert again.load() == "\n".join(f"PASS  {name}" for name in PIECES)
    arrivals, goodput = (again.use(name) for name in PIECES)
    times = arrivals(50, 8.0, 1.0, random.Random(3))
    assert times[-1] == pytest.approx(50 / 8)
    requests = [SimRequest(f"r{n}", float(time), 100, 20) for n, time in enumerate(times)]
    policy = create_policy("collocated", 2)[0]
    result = Simulator(policy, [Role.MIXED] * 2, LinearTime(0.02, 0.001, 0.0, 0.001), requests).run()
    slo = Slo(0.3, 0.05)
    share, per_gpu = goodput(outcomes_of(result.records), slo, 2)
    assert 0 < share < 1
    assert (share, per_gpu) == pytest.approx((result.attainment(slo), result.goodput(slo) / 2))


def test_counterexamples_show_the_requests_and_no_address() -> None:
    def examined(name: str, impl: Any) -> str:
        return str(lab.examine(name, impl))

    late = examined("bench.goodput", WRONG["bench.goodput"][0][0])
    assert "r1 scheduled 0, sent at 0.75, first token at 1" in late
    unstretched = examined("bench.arrivals", WRONG["bench.arrivals"][0][0])
    assert "rng=Random(0)" in unstretched
    assert " at 0x" not in unstretched
