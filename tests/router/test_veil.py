"""Policies in simulations and benchmarks don't know how long outputs will be, and learn as they do when serving."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nanopd_lab.bench.workload import Workload
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.core import SamplingParams
from nanopd_lab.router import Collocated, Decision, JobView, Policy, Role, Veiled, WorkerView
from nanopd_lab.sim import ConstantTime, SimRequest, Simulator

ENGINE = {"kv_cache_memory_bytes": 1 << 20}


class Watching(Collocated):
    def __init__(self) -> None:
        self.seen: list[int] = []
        self.told: list[tuple[int, int, bool]] = []

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        self.seen.append(job.params.max_tokens)
        return super().choose(job, workers, now)

    def finished(self, prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
        self.told.append((prompt_tokens, output_tokens, censored))


def test_a_veiled_policy_sees_one_max_tokens_and_hears_of_true_ends() -> None:
    policy = Watching()
    requests = [SimRequest(f"r{n}", 0.0, 10 + n, length) for n, length in enumerate((3, 40, 100))]
    veiled = Veiled(policy, 40)
    assert veiled.name == "collocated"
    Simulator(veiled, [Role.MIXED], ConstantTime(1.0), requests).run()
    assert policy.seen == [40, 40, 40]
    assert policy.told == [(10, 3, False), (11, 40, True), (12, 40, True)]


def test_without_the_veil_an_output_counts_as_cut_off() -> None:
    policy = Watching()
    Simulator(policy, [Role.MIXED], ConstantTime(1.0), [SimRequest("r", 0.0, 10, 3)]).run()
    assert policy.seen == [3]
    assert policy.told == [(10, 3, True)]


def test_a_veil_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Veiled(Watching(), 0)


@pytest.mark.parametrize("launcher", ["inline", "process"])
@pytest.mark.parametrize("veiled", [False, True])
def test_a_policy_in_a_benchmark_never_sees_a_true_length(launcher: str, veiled: bool) -> None:
    watching = Watching()
    policy: Policy = Veiled(watching) if veiled else watching
    requests = tuple(SimRequest(f"r{n}", n / 100, 10 + n, length) for n, length in enumerate((3, 40, 9)))
    config = ClusterConfig("random:tiny", policy=policy, launcher=launcher, threads=1, engine=ENGINE)
    with Cluster(config) as cluster:
        record = cluster.bench(Workload(requests, "three"), num_warmups=1)
        assert record["completed"] == 3
        assert watching.seen == [2048] * 5  # and those before, which show that all is well
        assert sorted(watching.told)[:-2] == sorted([(10, 3, False), (10, 3, False), (10, 3, False)])
        assert sorted(watching.told)[-2:] == [(11, 40, False), (12, 9, False)]
        assert cluster.controller.policy is policy
        # Whoever serves sees what is asked for, and hears that it cut the output off.
        cluster.generate([[5] * 8], SamplingParams(max_tokens=7, ignore_eos=True), use_tqdm=False)
        assert watching.seen[5:] == [2048 if veiled else 7]
        assert watching.told[5:] == [(8, 7, not veiled)]


def test_outputs_that_may_end_by_themselves_have_a_limit_that_anybody_may_see() -> None:
    policy = Watching()
    config = ClusterConfig("random:tiny", policy=policy, launcher="inline", engine=ENGINE)
    with Cluster(config) as cluster:
        cluster.bench(Workload((SimRequest("r", 0.0, 10, 6),), "one", ignore_eos=False), num_warmups=0)
    assert policy.seen == [6, 6]


def test_the_veil_lifts_also_when_a_worker_is_lost_meanwhile() -> None:
    config = ClusterConfig("random:tiny", policy=Watching(), launcher="inline", engine=ENGINE)
    with Cluster(config) as cluster:
        with cluster.veiled():
            cluster.controller.worker_down("w1", "died", cluster.clock())
        assert type(cluster.controller.policy) is Collocated  # what is left to one worker
