"""Engine and simulator decide alike: the same policy, asked the same questions, at the same times, in the same order.

The engine is the real one but for its device (`tests.cluster.virtual`); steps and pulls take as long in both. All that
a policy is shown is compared, not only what it says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.router import (
    Decision,
    JobView,
    Outlook,
    Policy,
    Postponed,
    Role,
    Slo,
    WorkerView,
    create_policy,
)
from nanopd_lab.sim import LinearTime, LinkModel, SimConfig, SimRequest, Simulator
from nanopd_lab.sim.clock import Kind
from tests.cluster.virtual import RoleChange, VirtualCluster
from tests.engine.symbolic import rollout

POLICIES = {
    "collocated": 2,
    "1p1d": 2,
    "2p1d": 3,
    "1p3d": 4,
    "disaggregated": 3,
    "round-robin": 3,
    "least-loaded": 3,
    "threshold-16": 4,
    "nanopd": 3,
    "nanopd-h20": 3,
    "adaptive": 3,
}
# Powers of two, so that sums of times are exact in whatever order they are made.
TIME = LinearTime(2**-6, 2**-10, 2**-16, 2**-12)
LINK = LinkModel(setup_s=2**-8, block_s=2**-11, bytes_per_s=2.0**20)
BLOCK_BYTES = 2**12
# What policies are told of it need not be exact, nor true. Some requests miss these objectives.
MODEL = IterationModel(2**-6, 0.0, 2**-10, 0.0, 2**-16, 2**-12)


class Asked(NamedTuple):
    """One question and its answer."""

    now: float
    job: JobView
    workers: tuple[WorkerView, ...]
    answer: Postponed | str | None


class Recorder:
    """A policy that keeps what it was asked, and all that its answer says."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name = policy, policy.name
        self.log: list[Asked] = []

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        answer = self.policy.choose(job, workers, now)
        kept: Any = answer
        if isinstance(answer, Decision):
            kept = f"{answer.route} {answer.reason} {answer.roles} {answer.explain()}"
        self.log.append(Asked(now, job, tuple(workers), kept))
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


class Case(NamedTuple):
    """What both are given."""

    policy: str
    requests: list[SimRequest]
    config: SimConfig
    changes: list[RoleChange]
    slo: Slo = Slo(0.25, 0.03)


def recorder(case: Case) -> tuple[Recorder, list[Role]]:
    tokens, ahead = case.config.max_num_batched_tokens, case.config.ahead
    outlook = Outlook(MODEL, case.slo, LINK, BLOCK_BYTES, case.config.block_size, tokens, ahead)
    policy, roles = create_policy(case.policy, POLICIES[case.policy], outlook)
    return Recorder(policy), roles


def simulated(case: Case) -> tuple[Recorder, Simulator]:
    policy, roles = recorder(case)
    simulator = Simulator(policy, roles, TIME, case.requests, case.config)

    def change(each: RoleChange, _: int) -> None:
        simulator.controller.set_role(each.worker, each.role, simulator.queue.now)
        simulator._collect()

    for each in case.changes:
        simulator.queue.push(each.time, Kind.FAULT, partial(change, each))
    assert not simulator.run().problems()
    return policy, simulator


def served(case: Case) -> tuple[Recorder, VirtualCluster]:
    policy, roles = recorder(case)
    cluster = VirtualCluster(policy, roles, TIME, case.requests, case.config, case.changes)
    cluster.run()
    for number, request in enumerate(case.requests):
        prompt = request.prompt(number).tolist()
        assert cluster.tokens[request.request_id] == rollout(prompt, request.params(), 0)
    return policy, cluster


def same(case: Case) -> tuple[Recorder, VirtualCluster, Simulator]:
    (told, simulator), (real, cluster) = simulated(case), served(case)
    for number, (a, b) in enumerate(zip(real.log, told.log, strict=False)):
        assert a == b, f"question {number}: the engine's policy was asked and said\n{a}\nthe simulator's\n{b}"
    assert len(real.log) == len(told.log)
    assert cluster.controller.decisions == simulator.controller.decisions >= len(case.requests)
    assert cluster.controller.role_changes == simulator.controller.role_changes
    return real, cluster, simulator


def case_of(seed: int, policy: str, count: int, **options: Any) -> Case:
    rng = random.Random(seed)
    caching = options.pop("caching", rng.random() < 0.5)
    config = SimConfig(
        num_blocks=rng.choice([24, 40, 200]),
        block_size=4,
        max_num_seqs=rng.choice([2, 6, 64]),
        max_num_batched_tokens=rng.choice([8, 24, 64]),
        max_model_len=90,
        enable_prefix_caching=caching,
        block_bytes=BLOCK_BYTES,
        link=LINK,
        message_s=2**-13,
        skip=rng.random() < 0.7,
        **options,
    )
    now, requests = 0, []
    gap = rng.choice([1, 4, 16])
    for number in range(count):
        now += rng.randint(0, 2 * gap)
        prompt = rng.randint(1, rng.choice([8, 60]))
        shared = rng.choice([0, 4, 16, 30]) if caching else 0
        prefix = rng.randint(1, 3) if shared else 0
        name, output = f"r{number}", rng.randint(1, 20)
        requests.append(SimRequest(name, now / 256, prompt, output, prefix, min(shared, prompt)))
    names = [f"w{number}" for number in range(POLICIES[policy])]
    changes = [
        RoleChange(rng.randint(0, now) / 256, rng.choice(names), rng.choice(list(Role)))
        for _ in range(rng.choice([0, 0, 3, 8]))
    ]
    # Whoever waits for a role gets one in the end.
    changes += [RoleChange((now + 1) / 256, name, Role.MIXED) for name in names if changes]
    return Case(policy, requests, config, changes)


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_every_decision_is_the_same(policy: str, seed: int) -> None:
    same(case_of(seed, policy, 25))
