"""What the controller does for policies: views that follow every job, ends that are told, roles, explanations."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nanopd_lab.core import Route, SamplingParams
from nanopd_lab.router import Candidate, Decision, Disaggregated, Explanation, JobView, Role, WorkerView
from tests.cluster.symbolic import Harness, Sizes

PROMPT = [1 + i % 5 for i in range(21)]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


class Scripted(Disaggregated):
    """w0 → w1, with what it is told and asked."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, bool, float]] = []
        self.roles: tuple[tuple[str, Role], ...] = ()
        self.asked = 0

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        route = Route("w0", "w1") if not self.roles else Route("w1", "w0")
        return Decision(route, "scripted", self.roles, self._explain)

    def _explain(self) -> Explanation:
        self.asked += 1
        return Explanation.of("scripted", [Candidate(Route("w0", "w1"), 1.0, {"ttft_s": 1.0})])

    def finished(self, prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
        self.told.append((prompt_tokens, output_tokens, censored, now))


def make() -> tuple[Harness, Scripted]:
    policy = Scripted()
    sizes = Sizes(num_blocks=16, budget=4, per_poll=1)
    harness = Harness(policy, [Role.PREFILL, Role.DECODE], sizes)
    harness.step()
    return harness, policy


def test_views_follow_a_job_from_prefill_through_transfer_to_decode() -> None:
    harness, _ = make()
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def look() -> None:
        a, b = harness.controller.views()
        state = (a.prefilling, a.leaving, a.leaving_tokens), (b.decoding, b.decode_tokens, b.arriving_tokens)
        if not seen or seen[-1] != state:
            seen.append(state)
        harness.controller.check_integrity()

    look()
    harness.submit("r", PROMPT, PARAMS)
    begun = harness.clock.now
    assert harness.controller.views()[0].prefill_since == begun
    for _ in range(100):
        look()
        harness.step()
    idle = ((0, 0, 0), (0, 0, 0))
    assert seen == [idle, ((1, 0, 0), (1, 21, 21)), ((0, 1, 21), (1, 21, 21)), ((0, 0, 0), (1, 21, 0)), idle]
    view = harness.controller.views()[0]
    assert view.prefill_since > begun
    assert (view.num_blocks, view.block_size, view.max_num_batched_tokens) == (16, 4, 4)


def test_ends_are_told_with_whether_the_output_would_have_gone_on() -> None:
    harness, policy = make()
    harness.submit("long", PROMPT, PARAMS)
    harness.run()
    harness.submit("gone", PROMPT, SamplingParams(max_tokens=40, ignore_eos=True))
    for _ in range(30):
        harness.step()
    got = len(harness.tokens["gone", 0])
    harness.controller.cancel("gone", harness.clock.now)
    assert [each[:3] for each in policy.told] == [(21, 6, True), (21, got, True)]
    assert policy.told[1][3] == harness.clock.now


def test_a_decision_changes_roles_before_its_route_is_checked() -> None:
    harness, policy = make()
    policy.roles = (("w0", Role.DECODE), ("w1", Role.PREFILL))
    harness.submit("r", PROMPT, PARAMS)
    assert [view.role for view in harness.controller.views()] == [Role.DECODE, Role.PREFILL]
    assert harness.controller.role_changes == 2
    harness.submit("again", PROMPT, PARAMS)
    assert harness.controller.role_changes == 2  # they are so already
    harness.run()
    assert not harness.settled["r", 0].path.problems()


def test_an_explanation_is_made_when_it_is_asked_for() -> None:
    harness, policy = make()
    harness.submit("r", PROMPT, PARAMS)
    assert policy.asked == 0
    found = harness.controller.explain("r")
    assert policy.asked == 1
    assert found.route == Route("w0", "w1")
    assert "ttft_s 1" in str(found)
    with pytest.raises(ValueError, match="nothing is known of a route of request 'other'"):
        harness.controller.explain("other")
