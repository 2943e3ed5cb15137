"""Random interleavings with faults: every request ends, rightly or with a clear error; nothing leaks; nothing hangs.

In the manner of FoundationDB's simulation: the whole control plane is one deterministic program of one seed. A failing
seed is printed; `replay(seed)` runs it again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.cluster.actions import ClusterBusyError, ClusterDownError, Limits, State
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.core import FinishReason, SamplingParams
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import Outlook, Role, Slo, create_policy
from tests.cluster.symbolic import Harness, Sizes
from tests.engine.symbolic import rollout

POLICIES = {
    "collocated": 2,
    "1p1d": 2,
    "2p1d": 3,
    "1p3d": 4,
    "disaggregated": 3,
    "round-robin": 3,
    "least-loaded": 3,
    "threshold-8": 4,
    "nanopd-h20": 3,
    "adaptive": 3,
}
# As slow as the turns of these tests, and with objectives that some miss, so that they are put off.
OUTLOOK = Outlook(IterationModel(0.01, 0.0, 1e-3, 0.0, 0.0, 0.0), Slo(0.3, 0.05), max_num_batched_tokens=8)


@dataclass
class Rates:
    """Chance of each kind of event at each turn."""

    submit: float = 0.25
    kill: float = 0.004
    step_fails: float = 0.01
    pull_fails: float = 0.05
    pull_late: float = 0.02
    cancel: float = 0.01
    role: float = 0.002
    pause: float = 0.01  # a longer silence: leases and deadlines run out


class Simulation:
    """A cluster and its callers, driven by one random number generator."""

    def __init__(self, seed: int, rates: Rates, max_restarts: int = 1_000_000) -> None:
        self.rng = rng = random.Random(seed)
        self.rates = rates
        policy_name = rng.choice(list(POLICIES))
        policy, roles = create_policy(policy_name, POLICIES[policy_name], OUTLOOK)
        sizes = Sizes(
            num_blocks=rng.choice([12, 24, 64]),
            budget=rng.choice([3, 8, 32]),
            seqs=rng.choice([2, 6]),
            caching=rng.random() < 0.7,
            ahead=rng.random() < 0.5,
            per_poll=rng.choice([1, 2, 100]),
        )
        limits = Limits(max_queue=50, max_attempts=rng.choice([2, 5, 50]), heartbeat_s=20.0)
        terms = LeaseTerms(duration=rng.choice([1.0, 6.0]), patience=rng.choice([0.5, 4.0]))
        blocks = None if rng.random() < 0.7 else [rng.choice([8, 12, 24]) for _ in roles]
        self.harness = Harness(policy, roles, sizes, limits, terms, max_restarts, blocks)
        self.harness.wire.fault = self._fault
        self.longest = max(self.harness.blocks.values()) * sizes.block_size - 12
        self.jobs: dict[str, tuple[list[int], SamplingParams, float]] = {}
        self.cancelled: set[str] = set()
        self.shared = [rng.randint(1, 5) for _ in range(20)]
        self.calm = False

    def _fault(self, pull: object) -> str | None:
        draw = self.rng.random()
        if self.calm or draw >= self.rates.pull_fails + self.rates.pull_late:
            return None
        return "fail" if draw < self.rates.pull_fails else "late"

    def submit(self) -> None:
        rng, harness = self.rng, self.harness
        prompt = self.shared[: rng.choice([0, 0, 5, 20])]
        prompt = [
            *prompt,
            *(rng.randint(1, 5) for _ in range(rng.randint(1, max(1, min(30, self.longest) - len(prompt))))),
        ]
        prompt = prompt[: self.longest]
        params = SamplingParams(max_tokens=rng.randint(1, 10), ignore_eos=rng.random() < 0.5)
        patience = rng.choice([3.0, 60.0, 600.0, float("inf")])
        name = f"r{len(self.jobs)}"
        try:
            harness.submit(name, prompt, params, patience)
        except (ClusterBusyError, ClusterDownError):
            return
        except InvalidRequestError:
            assert len(prompt) + params.max_tokens > min(harness.blocks.values()) * harness.sizes.block_size
            return
        self.jobs[name] = prompt, params, harness.clock() + patience

    def turn(self) -> None:
        """One random event."""
        rng, rates, harness = self.rng, self.rates, self.harness
        launcher = harness.launcher
        harness.clock.now += rng.random() * 0.02
        if rng.random() < rates.pause:
            harness.clock.now += rng.random() * 8
        names = list(launcher.hosts)
        draw = rng.random()
        if draw < rates.submit:
            self.submit()
        if names and rng.random() < rates.kill:
            harness.kill(rng.choice(names))
            names = list(launcher.hosts)
        if names and rng.random() < rates.step_fails:
            launcher.hosts[rng.choice(names)].runner.broken += rng.choice([1, 2, 3])  # type: ignore[attr-defined]
        if self.jobs and rng.random() < rates.cancel:
            name = rng.choice(list(self.jobs))
            self.cancelled.add(name)
            harness.controller.cancel(name, harness.clock())
        if names and rng.random() < rates.role:
            harness.controller.set_role(rng.choice(names), rng.choice(list(Role)), harness.clock())
        if names:
            name = rng.choice(names)
            count = None if rng.random() < 0.7 else rng.randint(0, 2)
            if rng.random() < 0.5:
                launcher.turn(name, count)
                if rng.random() < 0.3:
                    launcher.outboxes[name].append(launcher.hosts[name].core.beat())
            else:
                launcher.deliver(name, count)
        due = harness.controller.next_wakeup()
        if rng.random() < 0.1 or (due is not None and due <= harness.clock()):
            harness.controller.tick(harness.clock())
        launcher.collect()
        harness.take_events()

    def finish(self) -> None:
        """No further faults: everything must end, and be right."""
        harness = self.harness
        self.calm = True
        for host in harness.launcher.hosts.values():
            host.runner.broken = 0  # type: ignore[attr-defined]
        if any(harness.controller.state(name) is State.UP for name in harness.launcher.names):
            for name in harness.launcher.names:
                harness.controller.set_role(name, Role.MIXED, harness.clock())
        for _ in range(100_000):
            if not harness.controller.num_unsettled:
                break
            harness.step(0.05)
        else:
            raise AssertionError(f"these hang: {list(harness.controller._jobs)[:5]}")
        for _ in range(3):
            harness.step()
        harness.check()
        harness.check_empty()
        assert {name for name, _ in harness.ends} == set(self.jobs), "a request was lost"
        for name, (prompt, params, deadline) in self.jobs.items():
            self.check_result(name, prompt, params, deadline)

    def check_result(self, name: str, prompt: list[int], params: SamplingParams, deadline: float) -> None:
        harness = self.harness
        end, got = harness.ends[name, 0], harness.tokens[name, 0]
        want = rollout(prompt, params, 0)
        if end.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert got == want, f"{name}: {got}, not {want}"
        else:
            assert got == want[: len(got)], f"{name}: {got} is no beginning of {want}"
            if end.finish_reason is FinishReason.ERROR:
                assert end.error is not None
                assert len(end.error) > 20
            else:
                assert name in self.cancelled
        settled = harness.settled[name, 0]
        assert settled.path.complete
        assert not settled.path.problems(), settled.path.problems()
        assert settled.path.finished is not None
        assert settled.path.finished <= deadline + 8.5


def replay(
    seed: int, turns: int = 400, rates: Rates | None = None, max_restarts: int = 1_000_000
) -> Simulation:
    """Run one seed."""
    simulation = Simulation(seed, rates or Rates(), max_restarts)
    for number in range(turns):
        simulation.turn()
        if number % 20 == 0:
            simulation.harness.check()
    simulation.finish()
    return simulation


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_any_interleaving_ends_right(seed: int) -> None:
    replay(seed)


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_workers_that_never_come_back(seed: int) -> None:
    replay(seed, 250, Rates(kill=0.02), max_restarts=0)


@pytest.mark.slow
def test_a_soak_of_ten_thousand_requests() -> None:
    done = retried = moved = failed = 0
    for seed in range(24):
        simulation = Simulation(seed, Rates(submit=0.1))
        while len(simulation.jobs) < 420:
            simulation.turn()
        simulation.finish()
        done += len(simulation.jobs)
        retried += sum(len(s.path.attempts) > 1 for s in simulation.harness.settled.values())
        moved += sum(s.path.transferred_tokens for s in simulation.harness.settled.values())
        failed += sum(e.finish_reason is FinishReason.ERROR for e in simulation.harness.ends.values())
    print(f"{done} requests, {retried} tried again, {moved} tokens moved, {failed} ended with an error")
    assert done >= 10_000
    assert retried > 100
    assert moved > 1_000
    assert failed < done / 3
