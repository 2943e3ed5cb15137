"""The catalogue of failures, one by one, at every stage of a hand-over: each request ends rightly or with a clear
error, and nobody keeps a block."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nanopd_lab.cluster.accounts import PathReport
from nanopd_lab.cluster.actions import ClusterBusyError, ClusterDownError, Limits
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.core import FinishReason, SamplingParams
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import Role, RoundRobin, create_policy
from tests.cluster.symbolic import Harness, Sizes
from tests.engine.symbolic import rollout

PROMPT = [1 + i % 5 for i in range(21)]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
WANT = rollout(PROMPT, PARAMS, 0)


def make(policy: str = "1p1d", workers: int = 2, restarts: int = 3, **options: object) -> Harness:
    """Two workers, a budget of 4 tokens a step (so 6 chunks), one block a poll."""
    sizes = options.pop("sizes", None) or Sizes(num_blocks=16, budget=4, per_poll=1)
    harness = Harness(*create_policy(policy, workers), sizes, max_restarts=restarts, **options)  # type: ignore[arg-type]
    harness.step()
    return harness


def source_try(harness: Harness) -> object | None:
    return next(iter(harness.launcher.hosts["w0"].core._tries.values()), None)


def target_try(harness: Harness) -> object | None:
    return next(iter(harness.launcher.hosts["w1"].core._tries.values()), None)


def report(harness: Harness) -> PathReport:
    return next(iter(harness.controller._jobs.values())).path


STAGES: dict[str, Callable[[Harness], bool]] = {
    "sent": lambda h: True,
    "prefilling": lambda h: h.launcher.hosts["w0"].core.scheduler.num_steps >= 1,
    "first block published": lambda h: target_try(h) is not None and target_try(h).offer is not None,  # type: ignore[attr-defined]
    "pulling": lambda h: bool(h.launcher.hosts["w1"].core._pulling),
    "first token": lambda h: bool(h.tokens.get(("r", 0))),
    "held": lambda h: bool(h.launcher.hosts["w0"].core.scheduler.held),
    "received": lambda h: report(h).attempts[-1].received is not None,
    "decoding": lambda h: len(h.tokens.get(("r", 0), [])) >= 3,
}


def reach(harness: Harness, stage: str) -> None:
    harness.submit("r", PROMPT, PARAMS)
    for _ in range(60):
        if STAGES[stage](harness):
            return
        harness.step()
    raise AssertionError(f"never came to {stage!r}")


@pytest.mark.parametrize("restarts", [0, 3])
@pytest.mark.parametrize("worker", ["w0", "w1"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_dies_at_any_stage(stage: str, worker: str, restarts: int) -> None:
    harness = make(restarts=restarts)
    reach(harness, stage)
    harness.kill(worker)
    harness.run()
    assert harness.tokens["r", 0] == WANT
    assert harness.ends["r", 0].finish_reason is FinishReason.LENGTH
    path = harness.settled["r", 0].path
    assert not path.problems()
    failures = [attempt.failure for attempt in path.attempts]
    assert failures[-1] is None
    if len(failures) > 1:
        assert f"worker {worker} was killed" in str(failures[0])


@pytest.mark.parametrize("stage", ["received", "decoding"])
def test_the_source_is_not_needed_once_all_was_pulled(stage: str) -> None:
    harness = make()
    reach(harness, stage)
    harness.kill("w0")
    harness.run()
    assert harness.tokens["r", 0] == WANT
    assert len(harness.settled["r", 0].path.attempts) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_caller_cancels_at_any_stage(stage: str) -> None:
    harness = make()
    reach(harness, stage)
    harness.controller.cancel("r", harness.clock())
    harness.launcher.collect()
    harness.take_events()
    assert harness.ends["r", 0].finish_reason is FinishReason.ABORT  # at once
    harness.run()
    got = harness.tokens.get(("r", 0), [])
    assert got == WANT[: len(got)]


@pytest.mark.parametrize("stage", ["sent", "prefilling", "pulling", "held", "decoding"])
def test_a_deadline_ends_it_at_any_stage_and_says_where(stage: str) -> None:
    harness = make()
    harness.clock.now += 1
    reach(harness, stage)
    job = next(iter(harness.controller._jobs.values()))
    job.deadline = harness.clock()
    harness.controller._deadlines = [(job.deadline, 0, job)]
    harness.run()
    end = harness.ends["r", 0]
    assert end.finish_reason is FinishReason.ERROR
    assert "deadline passed after" in str(end.error)
    assert ("w0 computed" in str(end.error)) == (stage in ("sent", "prefilling", "pulling"))


@pytest.mark.parametrize("fault", ["fail", "late"])
def test_a_pull_that_fails_or_is_late_is_tried_on_another_route(fault: str) -> None:
    harness = make("1p2d", 3)
    broken = []
    harness.wire.fault = lambda pull: fault if not broken and not broken.append(pull) else None  # type: ignore[func-returns-value]
    harness.submit("r", PROMPT, PARAMS)
    for _ in range(200):
        harness.step(0.1)
    harness.run()
    assert harness.tokens["r", 0] == WANT
    first, second = harness.settled["r", 0].path.attempts
    assert first.failure is not None
    assert "pulling from w0 failed" in first.failure
    assert second.route.decode != first.route.decode


def test_a_block_that_was_reused_is_never_taken_for_the_old_one() -> None:
    """The lease runs out and the source gives the blocks to others, while the target has not heard of it."""
    sizes = Sizes(num_blocks=8, budget=4, per_poll=1)
    harness = make(terms=LeaseTerms(duration=1.0, patience=100.0), sizes=sizes)
    reach(harness, "held")
    source, target = harness.launcher.hosts["w0"], harness.launcher.hosts["w1"]
    harness.clock.now += 2.0
    harness.launcher.turn("w0")  # the lease has run out
    assert not source.core.scheduler.held
    harness.submit("other", [5, 4, 3, 2, 1] * 4, PARAMS)
    for _ in range(8):
        harness.launcher.turn("w0")  # writes over them; what it says waits
    stale = 0
    before = target.core.pull_ended

    def count(result: object, now: float) -> None:
        nonlocal stale
        stale += result.status.value == "stale"  # type: ignore[attr-defined]
        before(result, now)  # type: ignore[arg-type]

    target.core.pull_ended = count  # type: ignore[method-assign]
    for _ in range(8):
        harness.clock.now += 0.01
        harness.launcher.turn("w1")
    harness.run()
    assert stale
    assert harness.tokens["r", 0] == WANT
    assert harness.tokens["other", 0] == rollout([5, 4, 3, 2, 1] * 4, PARAMS, 0)


def test_a_source_that_is_preempted_publishes_again() -> None:
    """Decodes of the source take the blocks of a prompt that is being handed over; its blocks are re-used."""
    sizes = Sizes(num_blocks=12, block_size=4, budget=5, caching=False, per_poll=1)
    policy = RoundRobin()
    harness = Harness(policy, [Role.MIXED, Role.DECODE], sizes)
    harness.step()
    for number in range(2):  # collocated on w0, then growing there
        policy._turn = 0
        harness.submit(f"d{number}", [1 + number] * 6, SamplingParams(max_tokens=18, ignore_eos=True))
    policy._turn = 1  # w0 to w1
    harness.submit("r", PROMPT, PARAMS)
    harness.run()
    assert harness.tokens["r", 0] == WANT
    assert not harness.settled["r", 0].path.problems()


def test_a_full_decode_worker_gives_up_and_another_route_is_taken() -> None:
    harness = make(
        "disaggregated",
        3,
        terms=LeaseTerms(duration=60.0, patience=2.0),
        sizes=Sizes(num_blocks=16, budget=32),
    )
    blocker = harness.launcher.hosts["w1"].core.scheduler.allocator
    taken = blocker.allocate(14)
    harness.submit("r", PROMPT, PARAMS)
    for _ in range(80):
        harness.step(0.1)
    blocker.release(taken)
    harness.run()
    assert harness.tokens["r", 0] == WANT
    first = harness.settled["r", 0].path.attempts[0]
    assert first.route.decode == "w1"
    assert "no room for 6 blocks within 2.0 s (2 of 16 are free, 0 of 6 sequences run)" in str(first.failure)


def test_a_busy_decode_worker_is_waited_for_longer_than_a_stuck_one() -> None:
    """Far more requests than places: each waits for its turn, longer than the patience, and none is computed twice."""
    sizes = Sizes(num_blocks=64, budget=16, seqs=2)
    harness = make(terms=LeaseTerms(duration=2.0, patience=1.0), sizes=sizes, limits=Limits(max_jobs=100))
    for number in range(12):
        harness.submit(f"r{number}", [1 + number % 5] * 10, SamplingParams(max_tokens=12, ignore_eos=True))
    for _ in range(400):
        harness.step(0.05)
    harness.run()
    assert [len(settled.path.attempts) for settled in harness.settled.values()] == [1] * 12
    waits = [s.path.transfer_visible_s or 0.0 for s in harness.settled.values()]
    assert max(waits) > 2.0


def test_a_lease_that_nobody_renews_runs_out() -> None:
    harness = make(terms=LeaseTerms(duration=3.0, patience=1000.0))
    reach(harness, "held")
    harness.launcher.inboxes["w1"].clear()
    harness.launcher.outboxes["w1"].clear()
    for _ in range(10):  # the target is deaf and mute
        harness.clock.now += 0.5
        harness.launcher.turn("w0")
    assert not harness.launcher.hosts["w0"].core.scheduler.held
    assert harness.launcher.hosts["w0"].core.scheduler.allocator.stats().used == 0
    harness.launcher.deliver("w0")
    failure = report(harness).attempts[0].failure
    assert "nobody pulled the blocks within 3.0 s" in str(failure)


def test_a_lease_is_renewed_while_the_target_waits() -> None:
    harness = make(terms=LeaseTerms(duration=3.0, patience=1000.0), sizes=Sizes(num_blocks=16, budget=32))
    blocker = harness.launcher.hosts["w1"].core.scheduler.allocator
    taken = blocker.allocate(14)
    harness.submit("r", PROMPT, PARAMS)
    for _ in range(200):  # 20 s, seven leases
        harness.step(0.1)
    assert harness.launcher.hosts["w0"].core.scheduler.held
    blocker.release(taken)
    harness.run()
    assert harness.tokens["r", 0] == WANT
    assert len(harness.settled["r", 0].path.attempts) == 1


def test_a_silent_worker_is_fenced_and_its_work_done_elsewhere() -> None:
    harness = make("1p2d", 3, limits=Limits(heartbeat_s=5.0))
    reach(harness, "decoding")
    target = report(harness).attempts[-1].route.decode
    for _ in range(100):
        harness.clock.now += 0.1
        harness.controller.tick(harness.clock())
        harness.launcher.collect()
        for name in list(harness.launcher.hosts):
            if name != target:  # it is stopped
                harness.launcher.turn(name)
                harness.launcher.outboxes[name].append(harness.launcher.hosts[name].core.beat())
                harness.launcher.deliver(name)
    harness.run()
    assert harness.tokens["r", 0] == WANT
    assert f"worker {target} was silent for 5.0 s" in str(harness.settled["r", 0].path.attempts[0].failure)


def test_a_controller_that_was_stopped_itself_blames_no_worker() -> None:
    """Ctrl-Z, a debugger, a paused machine: all stood still, the clock did not, and then all go on."""
    harness = make("1p2d", 3, limits=Limits(heartbeat_s=5.0))
    reach(harness, "decoding")
    for _ in range(4):
        harness.clock.now += 60.0
        harness.controller.tick(harness.clock())  # before anybody has had time to speak
        harness.launcher.collect()
        for name, host in harness.launcher.hosts.items():
            harness.launcher.outboxes[name].append(host.core.beat())
            harness.launcher.deliver(name)
        harness.step(0.1)
    harness.run()
    assert harness.tokens["r", 0] == WANT
    assert len(harness.settled["r", 0].path.attempts) == 1


@pytest.mark.parametrize("broken", [1, 2, 7])
def test_a_step_that_raises_is_tried_again_and_then_elsewhere(broken: int) -> None:
    harness = make("collocated", 2)
    harness.launcher.hosts["w0"].runner.broken = broken  # type: ignore[attr-defined]
    harness.submit("r", PROMPT, PARAMS)
    harness.run()
    assert harness.tokens["r", 0] == WANT
    attempts = harness.settled["r", 0].path.attempts
    assert len(attempts) == (1 if broken == 1 else 2)
    if broken > 1:
        assert "w0: RuntimeError: the device is on fire" in str(attempts[0].failure)


def test_what_fails_everywhere_is_given_up_with_the_reason() -> None:
    harness = make("collocated", 2, limits=Limits(max_attempts=3))
    for host in harness.launcher.hosts.values():
        host.runner.broken = 1000  # type: ignore[attr-defined]
    harness.submit("r", PROMPT, PARAMS)
    harness.run()
    assert harness.ends["r", 0].finish_reason is FinishReason.ERROR
    assert "given up after 3 attempts; the last one: worker w" in str(harness.ends["r", 0].error)


def test_no_worker_left_is_an_error_not_a_wait() -> None:
    harness = make(restarts=0)
    reach(harness, "prefilling")
    harness.kill("w0")
    harness.kill("w1")
    assert "no worker is left" in str(harness.ends["r", 0].error)
    with pytest.raises(ClusterDownError, match="no worker is left"):
        harness.submit("late", PROMPT, PARAMS)
    harness.run()


def test_a_full_queue_refuses_and_loses_nothing() -> None:
    harness = make(limits=Limits(max_queue=2, max_jobs=1))
    for number in range(3):
        harness.submit(f"r{number}", PROMPT, PARAMS)
    with pytest.raises(ClusterBusyError, match="max_queue = 2"):
        harness.submit("r3", PROMPT, PARAMS)
    harness.run()
    assert [harness.tokens[f"r{number}", 0] for number in range(3)] == [WANT] * 3


def test_what_no_worker_can_hold_is_refused() -> None:
    harness = make()
    with pytest.raises(InvalidRequestError, match=r"= 100 tokens; the largest worker takes 64"):
        harness.submit("r", [1] * 90, SamplingParams(max_tokens=10))
    with pytest.raises(InvalidRequestError, match="empty"):
        harness.submit("r", [], PARAMS)
    harness.submit("r", PROMPT, PARAMS)
    with pytest.raises(InvalidRequestError, match="already in use"):
        harness.submit("r", PROMPT, PARAMS)
    harness.run()


def test_an_end_at_the_first_token_needs_no_transfer() -> None:
    harness = make()
    harness.submit("r", PROMPT, SamplingParams(max_tokens=1))
    harness.run()
    path = harness.settled["r", 0].path
    assert harness.tokens["r", 0] == WANT[:1]
    assert path.transferred_tokens < len(PROMPT)
    assert not path.problems()


def test_two_workers_that_hand_over_to_each_other_cannot_lock_each_other_out() -> None:
    sizes = Sizes(num_blocks=12, block_size=4, budget=8, caching=False)
    harness = Harness(*create_policy("disaggregated", 2), sizes, terms=LeaseTerms(1e9, 1e9))
    harness.step()
    for number in range(12):
        harness.submit(f"r{number}", [1 + (number + i) % 5 for i in range(28)], PARAMS)
    harness.run()
    assert all(len(settled.path.attempts) == 1 for settled in harness.settled.values())


def test_chunks_are_pulled_while_later_ones_are_computed() -> None:
    harness = make(sizes=Sizes(num_blocks=16, budget=4, per_poll=1))
    harness.submit("r", PROMPT, PARAMS)
    pulled_early = 0
    for _ in range(30):
        harness.step()
        target = target_try(harness)
        if target is not None and not harness.tokens.get(("r", 0)):
            pulled_early = len(target.arrived)  # type: ignore[attr-defined]
    harness.run()
    assert pulled_early >= 3
    usage = harness.settled["r", 0].path.attempts[0].decode
    assert usage is not None
    assert len(usage.pulls) >= 3
    assert usage.received == 21
