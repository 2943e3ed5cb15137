"""Frames of a finished run say what a count over its requests says; their ends are the result's figures."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.bench.disaggregation import UNFINISHED, UNSENT
from nanopd_lab.bench.frames import End, Rolling
from nanopd_lab.bench.recording import Recording
from nanopd_lab.bench.report import Setting, serving_result
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.bench.workload import Uniform, random_workload
from nanopd_lab.resources import data_dir
from nanopd_lab.router import Slo, create_policy
from nanopd_lab.sim import LinearTime, LinkModel, SimConfig, SimResult, Simulator
from nanopd_lab.sim.arrivals import Arrivals
from tests.bench.test_metrics import loaded
from tests.bench.test_request_table import result_of

SLO = Slo(0.3, 0.03)


def simulated(policy: str, rate: float, seed: int = 0, workers: int = 2) -> tuple[SimResult, dict[str, Any]]:
    workload = random_workload(50, Arrivals(rate), (Uniform(50, 300), Uniform(1, 40)), seed)
    config = SimConfig(
        num_blocks=500, max_num_batched_tokens=128, block_bytes=10_000, link=LinkModel(0.001, 0.0, 1e8)
    )
    time = LinearTime(0.01, 0.001, 0.0, 0.0005)
    run = Simulator(*create_policy(policy, workers), time, workload.requests, config).run()
    setting = Setting("random:tiny", workers, policy, modelled=True)
    result = serving_result(run.records, workload, setting, SLO, detailed=True)
    return run, json.loads(json.dumps(result))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["collocated", "1p1d", "1p2d", "round-robin", "disaggregated"]),
    st.floats(2, 30),
    st.integers(0, 9),
)
def test_frames_are_a_count_over_the_requests(policy: str, rate: float, seed: int) -> None:
    run, result = simulated(policy, rate, seed, 3 if policy == "1p2d" else 2)
    recording = Recording.of(result)
    for frame in recording.frames[:: len(recording.frames) // 7]:
        now = frame.time_s
        by_phase: Counter[tuple[str, str]] = Counter()
        for record in run.records:
            path = record.path
            assert path is not None
            last, finished = path.last, record.finished
            if record.arrival > now or last is None or finished is None or finished <= now:
                continue
            assert last.prefill is not None
            assert last.prefill.scheduled is not None
            route, moved = last.route, last.received or record.first_token
            assert record.first_token is not None
            assert moved is not None
            if now < last.started:
                by_phase["", "queued"] += 1
                continue
            if now < last.prefill.scheduled:
                by_phase[route.prefill, "waiting"] += 1
            elif now < record.first_token:
                by_phase[route.prefill, "prefilling"] += 1
            if now >= moved:
                by_phase[route.decode, "decoding"] += 1
            elif not route.collocated:
                by_phase[route.decode, "awaited"] += 1
        found = Counter({(w.name, name): getattr(w, name) for w in frame.workers
                         for name in ("waiting", "prefilling", "awaited", "decoding")})  # fmt: skip
        found["", "queued"] = frame.queued
        # The stages' last bits decide where a moment is on the edge of a phase.
        assert sum((found - by_phase).values()) + sum((by_phase - found).values()) <= 2
    # Little's law, from another count of the same.
    mean = float(np.mean([frame.running for frame in recording.frames]))
    assert mean == pytest.approx(result["pd"]["mean_concurrency"], rel=0.15)


@pytest.mark.parametrize("policy", ["collocated", "1p1d"])
def test_the_end_is_the_results(policy: str) -> None:
    run, result = simulated(policy, 6.0)
    recording = Recording.of(result)
    last = recording.frames[-1]
    assert (last.sent, last.completed, last.failed, last.running) == (50, 50, 0, 0)
    assert last.routes == result["pd"]["routes"]
    assert all(sum(worker[2:7]) == 0 for worker in last.workers)
    whole = Recording.of(result, window_s=recording.duration_s).frames[-1].rolling
    first = run.records[0].arrival
    assert whole.goodput * recording.duration_s == pytest.approx(
        result["pd"]["slo"]["goodput"] * (recording.duration_s - first)
    )
    assert whole.ttft_s == pytest.approx(result["pd"]["from_schedule"]["median_ttft_ms"] / 1e3)
    assert whole.tpot_s == pytest.approx(
        np.median([end.tpot_s for end in recording.ends])  # of one token too
    )
    roles = {worker.role for worker in last.workers}
    assert roles == ({"prefill", "decode"} if policy == "1p1d" else {"mixed"})


def test_a_simulators_result_needs_no_file() -> None:
    run, result = simulated("1p1d", 6.0)
    plain, detailed = Recording.of(run, SLO), Recording.of(RequestTable.of(result))
    assert [frame[:6] for frame in plain.frames] == [frame[:6] for frame in detailed.frames]
    assert plain.frames[-1].rolling == detailed.frames[-1].rolling
    assert "modelled" in plain.title


def test_lost_requests_are_failed_and_those_that_never_came_are_not() -> None:
    records = loaded(3, 12)
    for number, reason in ((0, UNSENT), (1, UNFINISHED), (2, "error")):
        records[number].finish_reason, records[number].finished = reason, None
    records[0].sent = records[0].first_token = None
    table = RequestTable.of(result_of(records, SLO))
    last = Recording.of(table).frames[-1]
    completed, failed = int(table.completed.sum()), int((table.judged & ~table.completed).sum())
    assert (last.sent, last.completed, last.failed) == (11, completed, failed)
    assert failed >= 1
    for record in records:
        record.sent, record.finish_reason = None, UNSENT
    with pytest.raises(ValueError, match="nothing to replay"):
        Recording.of(result_of(records, SLO))


def test_other_objectives_judge_the_same_ends() -> None:
    _, result = simulated("collocated", 12.0)
    recording = Recording.of(result)
    assert Recording.of(recording) is recording
    never = Recording.of(recording, Slo(1e-9))
    assert all(frame.rolling.goodput == 0 for frame in never.frames)
    assert [frame.rolling.completed for frame in never.frames] == [
        frame.rolling.completed for frame in recording.frames
    ]
    with pytest.raises(ValueError, match="window_s is 0"):
        Recording.of(recording, window_s=0.0)
    del result["pd"]["per_request"]
    with pytest.raises(ValueError, match="--save-detailed"):
        Recording.of(result)


def test_a_window_of_nobody_says_nothing() -> None:
    late = End(1.0, 0.5, 0.0, 0.5, True, "w0")
    assert Rolling.of([], SLO, 1.0) == Rolling()
    assert Rolling.of([late], SLO, 2.0) == Rolling(0.5, 0.0, 0.5, 0.0)
    assert Rolling.of([late._replace(ok=False)], Slo(), 2.0) == Rolling()


def test_recorded_sweeps_can_be_replayed() -> None:
    path = next((data_dir() / "recorded").glob("sweep-azure-*.jsonl"))
    for line in path.read_text(encoding="utf-8").splitlines()[::3]:
        result = json.loads(line)
        recording = Recording.of(result)
        assert recording.frames[-1].completed == result["completed"]
        assert "measured" in recording.title
        assert max(frame.running for frame in recording.frames) <= result["max_concurrent_requests"]
