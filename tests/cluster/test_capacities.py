"""What the largest worker takes is that of those that are left; what was let in for one that is gone ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.cluster.actions import Emit
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.messages import Capacity, Hello
from nanopd_lab.core import FinishReason, SamplingParams
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import create_policy

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
