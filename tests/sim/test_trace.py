"""The exported trace is valid and holds everything that happened."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from nanopd_lab.router import create_policy
from nanopd_lab.sim import (
    Kill,
    Lengths,
    LinearTime,
    LinkModel,
    SimConfig,
    SimResult,
    Simulator,
    poisson_arrivals,
)
from nanopd_lab.sim.trace import trace_events, write_trace


def simulate(trace: bool = True) -> SimResult:
    policy, roles = create_policy("1p2d", 3)
    requests = poisson_arrivals(60, 10.0, (Lengths(100, 1.0, 500), Lengths(30, 1.0, 200)), 1)
    config = SimConfig(block_bytes=1000, link=LinkModel(0.001, 0.0, 1e6), trace=trace)
    return Simulator(policy, roles, LinearTime(0.01, 1e-4), requests, config, [Kill(3.0, "w2", 1.0)]).run()


def test_a_trace_is_valid_and_complete(tmp_path: Path) -> None:
    result = simulate()
    write_trace(result, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert all({"name", "ph", "pid", "tid"} <= set(event) for event in events)

    steps = [event for event in events if event["ph"] == "X"]
    assert sum(event["args"]["steps"] for event in steps) == result.steps
    assert sum(event["dur"] for event in steps) == pytest.approx(1e6 * sum(w.busy_s for w in result.workers))
    computed = sum(record.path.computed_tokens for record in result.records if record.path)
    prefill = sum(event["args"]["prefill_tokens"] for event in steps)
    decode = sum(event["args"]["sequences"] * event["args"]["steps"] for event in steps)
    assert prefill < computed < prefill + decode + 500  # what a dead worker did is in no request's accounts
    by_worker: dict[int, list[tuple[float, float]]] = {}
    for event in steps:
        by_worker.setdefault(event["pid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(by_worker) == 3
    for spans in by_worker.values():  # a worker does one step at a time
        for (_, end), (begin, _) in itertools.pairwise(spans):
            assert begin >= end - 1e-3

    begins = Counter((e["cat"], e["id"], e["name"]) for e in events if e["ph"] == "b")
    ends = Counter((e["cat"], e["id"], e["name"]) for e in events if e["ph"] == "e")
    assert begins == ends
    assert sum(category == "pull" for category, _, _ in begins) == len(result.pulls) > 60
    for record in result.records:
        assert begins["request", record.request_id, record.request_id] == 1
        phases = [e for e in events if e.get("id") == record.request_id and e["name"] != record.request_id]
        assert phases[0]["ts"] == pytest.approx(record.arrival * 1e6)
        assert phases[-1]["ts"] == pytest.approx(record.finished * 1e6)
        assert {"queued", "prefill"} <= {e["name"] for e in phases}
    assert any(e["name"] == "queued again" for e in events)


def test_without_a_trace_it_says_how_to_get_one() -> None:
    with pytest.raises(ValueError, match="trace=True"):
        trace_events(simulate(trace=False))
