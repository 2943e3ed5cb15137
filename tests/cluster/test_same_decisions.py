"""Engine and simulator decide alike: the same policy, asked the same questions, at the same times, in the same order.

The engine is the real one but for its device (`tests.cluster.virtual`); steps and pulls take as long in both. All that
a policy is shown is compared, not only what it says.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
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
    time: LinearTime = TIME
    model: IterationModel = MODEL
    workers: int | None = None


def recorder(case: Case) -> tuple[Recorder, list[Role]]:
    tokens, ahead = case.config.max_num_batched_tokens, case.config.ahead
    outlook = Outlook(
        case.model, case.slo, case.config.link, BLOCK_BYTES, case.config.block_size, tokens, ahead
    )
    policy, roles = create_policy(case.policy, case.workers or POLICIES[case.policy], outlook)
    return Recorder(policy), roles


def simulated(case: Case) -> tuple[Recorder, Simulator]:
    policy, roles = recorder(case)
    simulator = Simulator(policy, roles, case.time, case.requests, case.config)

    def change(each: RoleChange, _: int) -> None:
        simulator.controller.set_role(each.worker, each.role, simulator.queue.now)
        simulator._collect()

    for each in case.changes:
        simulator.queue.push(each.time, Kind.FAULT, partial(change, each))
    assert not simulator.run().problems()
    return policy, simulator


def served(case: Case) -> tuple[Recorder, VirtualCluster]:
    policy, roles = recorder(case)
    cluster = VirtualCluster(policy, roles, case.time, case.requests, case.config, case.changes)
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
@settings(max_examples=20, deadline=None)
def test_every_decision_is_the_same(policy: str, seed: int) -> None:
    same(case_of(seed, policy, 25))


def test_a_worker_whose_only_sequence_was_preempted_goes_on_at_once() -> None:
    """And does not wait for a message, which may be seconds away: its pool is full of what is held for others."""
    same(case_of(101265963, "1p1d", 25))


def test_the_cases_hold_what_could_differ() -> None:
    """Transfers, prefix hits, roles that change, preemptions, retries, jobs that are put off or have to wait."""
    seen: Counter[str] = Counter()
    for policy in POLICIES:
        for seed in range(8):
            real, cluster, _ = same(case_of(1000 + seed, policy, 25))
            for settled in cluster.settled.values():
                seen["transfers"] += settled.path.transferred_tokens > 0
                seen["prefix hits"] += settled.path.cached_tokens > 0
                seen["retries"] += len(settled.path.attempts) > 1
            seen["role changes"] += cluster.controller.role_changes
            seen["preemptions"] += sum(host.core.scheduler.num_preemptions for host in cluster.hosts.values())
            seen["put off"] += any(isinstance(each.answer, Postponed) for each in real.log)
            seen["waits"] += any(each.answer is None for each in real.log)
    rare = ("retries", "put off", "waits")
    assert all(seen[name] > 0 for name in rare), seen
    assert all(seen[name] > 20 for name in ("transfers", "prefix hits", "role changes", "preemptions")), seen


def test_adaptive_changes_roles_alike() -> None:
    """Prompts hold up decodes of 8 ms by 50 ms, and 12.5 are promised: it separates the roles by what it has heard
    by then."""
    rng = random.Random(3)
    now, requests = 0, []
    for number in range(250):
        now += rng.randint(0, 17)
        requests.append(SimRequest(f"r{number}", now / 256, rng.randint(40, 60), rng.randint(9, 15)))
    config = case_of(0, "adaptive", 1, caching=False).config
    config = replace(
        config,
        num_blocks=400,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        link=LinkModel(bytes_per_s=2.0**25),
    )
    time, model = LinearTime(2**-7, 2**-10), IterationModel(2**-7, 0.0, 2**-10, 0.0, 0.0, 0.0)
    real, cluster, _ = same(Case("adaptive", requests, config, [], Slo(2.0, 0.0125), time, model, 4))
    assert cluster.controller.role_changes > 0
    assert {each.workers[0].role for each in real.log} > {Role.MIXED}


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_with_steps_planned_ahead_collocated_decisions_are_the_same(seed: int) -> None:
    """With room for all, as a simulated worker frees the place of a sequence one step sooner. Transfers differ: a host
    handles what comes during a step one turn before the simulator, which only plans with it at that time."""
    case = case_of(seed, "collocated", 25, ahead=True, caching=False)
    same(case._replace(config=replace(case.config, num_blocks=1000, max_num_seqs=64), changes=[]))
