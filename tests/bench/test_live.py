"""A load whose rate changes while it runs: its arrivals are the process's; however it ends, the cluster is whole."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanopd_lab import Cluster, ClusterConfig, SamplingParams
from nanopd_lab.bench.live import MOST_OPEN, LiveLoad, Phase, random_requests
from nanopd_lab.bench.pace import Pace
from nanopd_lab.bench.recorder import Recorder
from nanopd_lab.bench.workload import Fixed, Uniform, random_workload
from nanopd_lab.cluster.inline import InlineLauncher
from nanopd_lab.cluster.launcher import WorkerLauncher
from nanopd_lab.core import Route
from nanopd_lab.router import Slo
from nanopd_lab.sim.arrivals import Arrivals

ENGINE = {"kv_cache_memory_bytes": 1 << 20}
SHORT = (Uniform(4, 30), Uniform(2, 6))
GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


def inline(policy: str = "1p1d", **options: Any) -> Cluster:
    config = ClusterConfig(
        "random:tiny", policy=policy, launcher="inline", devices=("cpu",) * 2, engine=ENGINE, **options
    )
    return Cluster(config)


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def threads() -> set[str]:
    return {
        each.name for each in threading.enumerate() if each.name in ("nanopd-live-load", "nanopd-recorder")
    }


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    until(lambda: not threads())


# ---------------------------------------------------------------------- the pace


@given(
    st.integers(0, 10**6),
    st.lists(
        st.tuples(st.floats(0.1, 9), st.sampled_from([0.0, 0.3, 1.0, 7.0, 40.0])), min_size=1, max_size=6
    ),
    st.lists(st.floats(0, 30), max_size=20),
)
def test_between_two_arrivals_lies_one_exponential_of_rate_times_time(
    seed: int, rates: list[tuple[float, float]], looks: list[float]
) -> None:
    """Time rescaling, with the same draws; and how often one looks makes no difference."""

    def moments(more: list[float]) -> list[float]:
        pace, now, found = Pace(rates[0][1], random.Random(seed), 0.0), 0.0, []
        for seconds, rate in rates:
            found += pace.due(now)
            pace.change(rate, now)
            for look in sorted(each for each in more if now < each < now + seconds):
                found += pace.due(look)
            now += seconds
        return found + pace.due(now)

    found = moments([])
    assert found == sorted(found)
    assert found == pytest.approx(moments(looks))
    edges = list(itertools.accumulate((seconds for seconds, _ in rates), initial=0.0))

    def mass(until: float) -> float:
        return sum(
            rate * max(0.0, min(until, end) - begin)
            for begin, end, (_, rate) in zip(edges, edges[1:], rates, strict=False)
        )

    rng = random.Random(seed)
    gaps = [rng.expovariate(1.0) for _ in range(len(found) + 1)]
    assert [mass(each) for each in found] == pytest.approx(list(itertools.accumulate(gaps))[:-1])
    assert mass(math.inf) < sum(gaps) + 1e-9


# ---------------------------------------------------------------------- the recorder


def test_what_is_recorded_is_what_the_load_generator_measured() -> None:
    with inline("round-robin") as cluster:
        workload = random_workload(20, Arrivals(60.0), SHORT, seed=1)
        with Recorder(cluster, Slo(1.0, 1.0), interval_s=0.05) as recorder:
            with pytest.raises(ValueError, match="started before"):
                recorder.start()
            result = cluster.bench(workload, num_warmups=0, ready_timeout_s=0, detailed=True)
        recording = recorder.recording()
        last, ends = recording.frames[-1], recording.ends
        assert (last.sent, last.completed, last.failed, last.running) == (20, 20, 0, 0)
        assert last.routes == result["pd"]["routes"]
        # The cluster stamps a request just after the generator has.
        assert sorted(end.ttft_s or 0 for end in ends) == pytest.approx(sorted(result["ttfts"]), abs=0.02)
        assert sorted(end.e2e_s or 0 for end in ends) == pytest.approx(sorted(result["latencies"]), abs=0.02)
        assert all(
            sum(
                getattr(worker, name)
                for worker in frame.workers
                for name in ("prefilling", "waiting", "decoding")
            )
            <= frame.running
            for frame in recording.frames
        )
        assert any(worker.kv_used for frame in recording.frames for worker in frame.workers)
        assert [worker.kv_total for worker in last.workers] == [85, 85]
        assert [frame.sent for frame in recording.frames] == sorted(frame.sent for frame in recording.frames)
        assert "round-robin, 2 workers" in recording.title
        assert recorder.error is None
        assert 0 < recorder.busy_s < recording.duration_s
        assert not cluster._requests._watchers


def test_workers_are_seen_at_what_they_do() -> None:
    with inline() as cluster, cluster.watched() as look:
        name = cluster.submit(list(range(3, 23)), GREEDY)
        w0, w1 = look().workers
        assert (w0.prefilling, w0.decoding, w1.awaited, w1.decoding) == (1, 0, 1, 0)
        seen = [look()]
        while not (output := next(iter(cluster.poll(0.0)), None)) or not output.settled:
            seen.append(look())
        assert any(each.workers[1].decoding for each in seen)
        after = look()
        assert [each.request_id for each in after.ended] == [name]
        assert after.ended[0].paths[0].route == Route("w0", "w1")
        assert after.running == 0
        assert not any(sum(each[5:]) for each in after.workers)
    with pytest.raises(ValueError, match="closed"):
        look()


def test_times_count_from_when_a_request_was_to_be_sent() -> None:
    with inline("collocated") as cluster, Recorder(cluster, lateness={"a": 3.0}) as recorder:
        for name in ("a", "b"):
            list(cluster.stream([cluster.submit([1, 2, 3], GREEDY, name)]))
        recorder.stop()
        late, plain = recorder.ends
        assert (late.ttft_s or 0) > 3.0 > (plain.ttft_s or 9)
        assert (late.e2e_s or 0) > 3.0 > (late.tpot_s or 9)


def test_a_recorder_ends_with_its_cluster_and_says_so() -> None:
    cluster = inline()
    recorder = Recorder(cluster, interval_s=0.01)
    recorder.start()
    until(lambda: len(recorder.frames) > 2)
    cluster.close()
    until(lambda: recorder.error is not None)
    assert "closed" in str(recorder.error)
    recorder.stop()
    for wrong in ({"interval_s": 0.0}, {"window_s": -1.0}):
        with pytest.raises(ValueError, match="positive"):
            Recorder(cluster, **wrong)


# ---------------------------------------------------------------------- the load


def test_requests_flow_at_the_rate_that_is_set_and_others_are_left_alone() -> None:
    with inline("collocated") as cluster:
        mine = cluster.submit([3, 4, 5], GREEDY)
        load = LiveLoad(cluster, random_requests(SHORT, cluster.vocab_size), 0.0)
        load.start()
        with pytest.raises(ValueError, match="running already"):
            load.start()
        time.sleep(0.1)
        assert load.sent == 0
        load.set_rate(200.0)
        until(lambda: load.sent > 10)
        for use in (cluster.poll, cluster.check_integrity, lambda: cluster.generate([[1]], GREEDY)):
            with pytest.raises(ValueError, match="nanopd-live-load has this inline cluster to itself"):
                use()
        load.stop()
        assert (load.phase, load.error, load.refused) == (Phase.IDLE, None, 0)
        assert len(load.lateness) == load.sent
        assert min(load.lateness.values()) >= 0
        cluster.check_integrity()
        assert {output.request_id for output in cluster.stream([mine]) if output.settled} == {mine}
        assert cluster.poll() == []
        assert cluster.controller.policy.name == "collocated"
        load.stop()  # does nothing
        for wrong in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="finite and not negative"):
                load.set_rate(wrong)
        with pytest.raises(ValueError, match="drain_s"):
            LiveLoad(cluster, random_requests(SHORT, 9), 1.0, drain_s=-1)


@pytest.mark.parametrize("drain_s", [0.0, 0.05])
def test_what_does_not_finish_is_cancelled_and_leaves_nothing(drain_s: float) -> None:
    with inline() as cluster:
        load = LiveLoad(
            cluster, random_requests((Fixed(20), Fixed(600)), cluster.vocab_size), 300.0, drain_s=drain_s
        )
        with Recorder(cluster, interval_s=0.02) as recorder:
            load.start()
            until(lambda: load.sent > 5)
            load.stop()
        last = recorder.recording().frames[-1]
        assert last.failed > 0
        assert last.sent == load.sent == last.completed + last.failed
        cluster.check_integrity()
        assert all(host.core.idle for host in cluster.launcher.hosts.values())  # type: ignore[union-attr]
        cluster.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


def test_far_too_fast_a_load_is_refused_and_not_piled_up() -> None:
    with inline() as cluster:
        make = random_requests((Fixed(4), Fixed(2)), cluster.vocab_size)
        load = LiveLoad(cluster, make, 1e6, drain_s=0.0)
        load.start()
        until(lambda: load.refused > 0)
        load.stop()
        assert load.sent <= MOST_OPEN + 1000
        assert "lower the rate" in str(load.refusal)
        assert load.error is None
        cluster.check_integrity()


def test_a_request_that_cannot_be_made_ends_the_run_with_its_error() -> None:
    def make(rng: random.Random) -> tuple[list[int], SamplingParams]:
        if load.sent == 3:
            raise KeyError("no more prompts")
        return [1, 2, 3], SamplingParams(max_tokens=100, ignore_eos=True)

    with inline() as cluster:
        load = LiveLoad(cluster, make, 500.0)
        load.start()
        until(lambda: load.phase is Phase.IDLE)
        assert isinstance(load.error, KeyError)
        assert load.sent == 3
        cluster.check_integrity()
        assert cluster.poll() == []


def test_closing_an_inline_cluster_under_it_ends_it() -> None:
    cluster = inline()
    load = LiveLoad(cluster, random_requests(SHORT, cluster.vocab_size), 100.0)
    load.start()
    until(lambda: load.sent > 3)
    cluster.close()
    until(lambda: load.phase is Phase.IDLE)
    assert load.error is not None
    with pytest.raises(ValueError, match="closed"):
        load.start()


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_worker_dies_under_it(restarts: int) -> None:
    with inline("collocated", max_restarts=restarts) as cluster:
        launcher, ordinary = cluster.launcher, random_requests(SHORT, cluster.vocab_size)
        assert isinstance(launcher, InlineLauncher)
        deaths = iter(["w0", "w1"])

        def make(rng: random.Random) -> Any:
            if load.sent in (5, 15):  # in the thread that has the workers compute
                launcher.kill(next(deaths))
            return ordinary(rng)

        load = LiveLoad(cluster, make, 200.0)
        load.start()
        until(lambda: load.sent > 20 or load.phase is Phase.IDLE)
        load.stop()
        if restarts:
            assert load.error is None
            cluster.check_integrity()
        else:
            assert "no worker is left" in str(load.error)


def test_over_processes_a_death_is_survived_and_a_closed_cluster_ends_it() -> None:
    config = ClusterConfig(
        "random:tiny", policy="1p1d", threads=1, engine=ENGINE, devices=("cpu",) * 2, max_restarts=0
    )
    with Cluster(config) as cluster:
        launcher = cluster.launcher
        assert isinstance(launcher, WorkerLauncher)
        load = LiveLoad(cluster, random_requests(SHORT, cluster.vocab_size), 50.0)
        with Recorder(cluster, interval_s=0.05) as recorder:
            load.start()
            until(lambda: recorder.frames[-1].completed > 5)
            pid = launcher.pid("w1")
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            until(lambda: recorder.frames[-1].workers[1].role == "gone")
            now = recorder.frames[-1].completed
            until(lambda: recorder.frames[-1].completed > now)
            load.stop()
        last = recorder.recording().frames[-1]
        assert (last.sent, last.running, last.failed) == (load.sent, 0, 0)
        assert last.workers[0].role == "mixed"  # alone
        assert set(last.routes) == {"w0→w1", "w0"}
        cluster.check_integrity()
        load.start()
        until(lambda: load.sent > 0)
    until(lambda: load.phase is Phase.IDLE)
    assert "closed" in str(load.error)
    with pytest.raises(ValueError, match="closed"):
        cluster.poll()


class Life(RuleBasedStateMachine):
    """Anybody presses anything at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = inline("round-robin")
        self.ends = 0
        self.starts = 0
        self.load = LiveLoad(
            self.cluster,
            random_requests(SHORT, self.cluster.vocab_size),
            300.0,
            drain_s=0.02,
            on_end=self._ended,
        )

    def _ended(self) -> None:
        self.ends += 1

    @rule()
    def start(self) -> None:
        before = self.load.phase
        try:
            self.load.start()
        except ValueError:
            assert before is not Phase.IDLE
        else:
            self.starts += 1

    @rule()
    def stop(self) -> None:
        self.load.stop()
        assert self.load.phase is Phase.IDLE
        assert self.ends == self.starts
        self.cluster.check_integrity()
        self.cluster.generate([[1, 2, 3]], GREEDY, use_tqdm=False)

    @rule()
    def ask_to_stop(self) -> None:
        self.load.ask_to_stop()

    @rule(rate=st.sampled_from([0.0, 20.0, 500.0]))
    def set_rate(self, rate: float) -> None:
        self.load.set_rate(rate)

    @precondition(lambda self: self.load.phase is Phase.RUNNING and self.load.rate > 0)
    @rule()
    def wait(self) -> None:
        sent = self.load.sent
        until(lambda: self.load.sent > sent)

    @invariant()
    def nothing_went_wrong(self) -> None:
        assert self.load.error is None
        assert self.load.refused == 0 or self.load.refusal is not None

    def teardown(self) -> None:
        self.stop()
        self.cluster.close()


Life.TestCase.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)
TestLife = Life.TestCase
