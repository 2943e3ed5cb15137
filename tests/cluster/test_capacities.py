"""What the largest pair of workers takes is that of those that are left; what was let in for one that is gone ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.cluster.actions import Emit
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.messages import Capacity, Ended, Failed, Hello, Usage
from nanopd_lab.core import FinishReason, SamplingParams
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import JobView, Outlook, Role, Slo, Veiled, WorkerView, create_policy, legal_routes
from tests.cluster.symbolic import Harness, Sizes

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
SMALL, MIDDLE, LARGE = 4, 8, 100  # blocks of 16 tokens


def hello(blocks: int) -> Hello:
    return Hello(Capacity(blocks, 16, 1, 512, 10_000))


def controller(*blocks: int, policy: str = "least-loaded") -> Controller:
    chosen, roles = create_policy(policy, len(blocks))
    made = Controller(chosen, {f"w{number}": role for number, role in enumerate(roles)})
    for number, size in enumerate(blocks):
        made.handle(f"w{number}", hello(size), 0.0)
    return made


def ends(made: Controller) -> dict[str, Emit]:
    return {each.request_id: each for each in made.actions if isinstance(each, Emit) and each.finish_reason}


def test_a_worker_that_is_gone_for_good_takes_nothing() -> None:
    made = controller(SMALL, LARGE)
    assert made.longest == 16 * LARGE
    made.worker_down("w1", "died", 1.0, restarting=True)
    assert made.longest == 16 * LARGE  # it comes back
    made.worker_down("w1", "died again", 2.0)
    assert made.longest == 16 * SMALL
    with pytest.raises(
        InvalidRequestError, match=r"= 110 tokens; the largest worker takes 64 .* raise kv_cache"
    ):
        made.submit("r", [1] * 100, PARAMS, 3.0)


def test_who_waits_for_it_or_was_there_ends_and_the_queue_goes_on() -> None:
    made = controller(SMALL, LARGE)
    made.submit("there", [1] * 100, PARAMS, 0.0)
    for number in range(3):
        made.submit(f"waits {number}", [1] * 100, PARAMS, 0.0)
    made.submit("small", [1] * 10, PARAMS, 0.0)
    assert (made.decisions, made.queue_length) == (1, 4)
    made.worker_down("w1", "died", 1.0)
    found = ends(made)
    assert set(found) == {"there", "waits 0", "waits 1", "waits 2"}
    for end in found.values():
        assert end.finish_reason is FinishReason.ERROR
        assert "= 110 tokens; the largest worker takes 64" in str(end.error)
    assert made.queue_length == 0
    assert made.decisions == 2  # that of "small"
    made.check_integrity()


def test_a_worker_that_comes_back_smaller_takes_less() -> None:
    made = controller(SMALL, LARGE)
    made.submit("r", [1] * 100, PARAMS, 0.0)
    made.worker_down("w1", "died", 1.0, restarting=True)
    assert not ends(made)
    made.handle("w1", hello(MIDDLE), 2.0)
    assert made.longest == 16 * MIDDLE
    assert not ends(made)
    made.worker_down("w1", "died", 3.0, restarting=True)
    made.handle("w1", hello(SMALL), 4.0)
    assert "the largest worker takes 64" in str(ends(made)["r"].error)
    made.check_integrity()


def test_one_that_has_not_told_yet_may_take_it() -> None:
    chosen, roles = create_policy("least-loaded", 3)
    made = Controller(chosen, {f"w{number}": role for number, role in enumerate(roles)})
    made.handle("w0", hello(SMALL), 0.0)
    made.handle("w1", hello(LARGE), 0.0)
    made.submit("r", [1] * 100, PARAMS, 0.0)
    made.worker_down("w1", "died", 1.0)
    assert not ends(made)
    made.handle("w2", hello(LARGE), 2.0)
    assert made.decisions == 2
    assert not ends(made)


EVENTS = st.tuples(st.integers(0, 2), st.sampled_from(["gone", "down", SMALL, MIDDLE, LARGE]))


@given(st.lists(EVENTS, max_size=12))
def test_the_largest_is_that_of_those_who_are_left(events: list[tuple[int, str | int]]) -> None:
    """Beside a plain list of what each has told last; and nobody waits who can't be served."""
    made, left = controller(SMALL, MIDDLE, LARGE), {0: SMALL, 1: MIDDLE, 2: LARGE}
    for number, (worker, event) in enumerate(events):
        if worker not in left:
            continue
        if event == "gone":
            if len(left) == 1:
                break
            del left[worker]
            made.worker_down(f"w{worker}", "died", float(number))
        elif event == "down":
            made.worker_down(f"w{worker}", "died", float(number), restarting=True)
        else:
            left[worker] = int(event)  # of another life
            made.worker_down(f"w{worker}", "died", float(number), restarting=True)
            made.handle(f"w{worker}", hello(int(event)), float(number))
        assert made.longest == 16 * max(left.values())
        if made.longest >= 110:
            made.submit(f"r{number}", [1] * 100, PARAMS, float(number))
        made.check_integrity()
        waiting = [job for job in made._jobs.values() if job.queued]
        assert all(len(job.prompt) + 10 <= made.longest for job in waiting)


# ---------------------------------------------------------------------- pairs

PREFILL_TAKES = (
    r"= 110 tokens; both workers of a route must hold it, and the largest pair that policy disaggregated may choose, "
    r"w0 for prefill and w1 for decode, takes 64: w{} has max_model_len 10000, 4 blocks of 16; shorten the prompt or "
    r"lower max_tokens, or set kv_cache_memory_bytes, for pools alike"
)


@pytest.mark.parametrize(("blocks", "smaller"), [((LARGE, SMALL), 1), ((SMALL, LARGE), 0)])
def test_a_pair_takes_what_the_smaller_of_its_workers_takes(blocks: tuple[int, int], smaller: int) -> None:
    made = controller(*blocks, policy="1p1d")
    assert made.longest == 16 * SMALL
    for policy in (made.policy, Veiled(made.policy)):
        made.exchange(policy)
        with pytest.raises(InvalidRequestError, match=PREFILL_TAKES.format(smaller)):
            made.submit("r", [1] * 100, PARAMS, 0.0)
    made.submit("fits", [1] * 54, PARAMS, 0.0)
    assert (made.decisions, made.queue_length) == (1, 0)


def test_a_pair_is_found_where_there_is_one() -> None:
    made = controller(SMALL, LARGE, SMALL, LARGE, policy="2p2d")
    assert made.longest == 16 * LARGE
    made.submit("r", [1] * 100, PARAMS, 0.0)
    attempt = made._jobs["r", 0].attempt
    assert attempt is not None
    assert attempt.report.route == ("w1", "w3")


def test_the_pools_of_a_split_cluster_that_runs() -> None:
    """Nothing is lost, left behind or held up by what cannot be held."""
    policy, roles = create_policy("1p1d", 2)
    harness = Harness(policy, roles, Sizes(block_size=4, caching=False), blocks=(24, 6))
    with pytest.raises(InvalidRequestError, match="w1 for decode, takes 24: w1 has"):
        harness.submit("too long", [1] * 20, SamplingParams(max_tokens=5, ignore_eos=True))
    for number in range(4):
        harness.submit(f"r{number}", [1] * 20, SamplingParams(max_tokens=4, ignore_eos=True))
    harness.run()
    assert {name: len(tokens) for (name, _), tokens in harness.tokens.items()} == {
        f"r{n}": 4 for n in range(4)
    }


def test_who_loses_the_pair_while_it_runs_ends_when_it_is_to_be_tried_again() -> None:
    made = controller(LARGE, LARGE, SMALL, policy="1p2d")
    made.submit("runs", [1] * 100, PARAMS, 0.0)
    made.submit("waits", [1] * 100, PARAMS, 0.0)
    made.submit("waits too", [1] * 100, PARAMS, 0.0)
    made.set_role("w1", Role.PREFILL, 1.0)
    assert made.longest == 16 * SMALL
    key = next(key for key, (job, _) in made._attempts.items() if job.request_id == "runs")
    made.handle("w1", Failed(key, "the link broke"), 2.0)
    assert "takes 64: w2 has" in str(ends(made)["runs"].error)
    made.submit("small", [1] * 10, PARAMS, 3.0)
    for attempt_key, (_, attempt) in list(made._attempts.items()):
        for name in list(attempt.open):
            made.handle(name, Ended(attempt_key, Usage()), 4.0)
    made.check_integrity()


def test_roles_that_change_one_by_one_end_nobody() -> None:
    made = controller(LARGE, LARGE, policy="1p1d")
    made.submit("there", [1] * 100, PARAMS, 0.0)
    made.set_role("w0", Role.DECODE, 1.0)  # nobody prefills now
    made.submit("comes", [1] * 100, PARAMS, 1.0)
    made.set_role("w1", Role.PREFILL, 2.0)
    assert not ends(made)


OUTLOOK = Outlook(IterationModel(0.01, 0.0, 1e-3, 0.0, 0.0, 0.0), Slo(0.3, 0.05), max_num_batched_tokens=512)
NAMES = [
    "collocated",
    "disaggregated",
    "round-robin",
    "least-loaded",
    "threshold-8",
    "threshold",
    "nanopd-h20",
    "first-fit",
    "adaptive",
]
WORKERS = st.lists(
    st.tuples(st.sampled_from([SMALL, MIDDLE, LARGE]), st.sampled_from(Role)), min_size=2, max_size=5
)


@given(st.sampled_from(NAMES), WORKERS, st.sampled_from([54, 118, 1590]))
def test_refused_is_what_the_policy_itself_finds_no_pair_for(
    name: str, workers: list[tuple[int, Role]], prompt_tokens: int
) -> None:
    """Beside the policy's own answer over those idle workers that could hold it."""
    policy = create_policy(name, len(workers), OUTLOOK)[0]
    roles = {f"w{number}": role for number, (_, role) in enumerate(workers)}
    made = Controller(policy, roles)
    for number, (blocks, _) in enumerate(workers):
        made.handle(f"w{number}", hello(blocks), 0.0)
    total = prompt_tokens + PARAMS.max_tokens
    views = [
        WorkerView(
            f"w{number}", role, max_num_seqs=1, num_blocks=blocks, block_size=16, max_num_batched_tokens=512
        )
        for number, (blocks, role) in enumerate(workers)
    ]
    fitting = [view for view in views if view.num_blocks * view.block_size >= total]
    fresh = create_policy(name, len(workers), OUTLOOK)[0]
    answer = (
        fresh.choose(JobView(prompt_tokens, prompt_tokens, PARAMS, 0.0), fitting, 0.0) if fitting else None
    )
    try:
        made.submit("r", [1] * prompt_tokens, PARAMS, 0.0)
    except InvalidRequestError:
        assert answer is None
        assert made.longest < total
        assert made.num_unsettled == 0
    else:
        assert made.longest >= total
        # Who is let in is served at once, unless roles allow nothing at present.
        assert made.decisions == (answer is not None)
        assert answer is not None or not [route for route in legal_routes(views) if possible(name, route)]
    made.check_integrity()


def possible(name: str, route: tuple[str, str]) -> bool:
    """As far as the policy's kind goes."""
    return (name != "disaggregated" or route[0] != route[1]) and (
        name != "collocated" or route[0] == route[1]
    )
