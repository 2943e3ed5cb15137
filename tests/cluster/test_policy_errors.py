"""A policy that anybody may have written goes wrong: its requests fail and say why; others are served."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab import Cluster, ClusterConfig, SamplingParams
from nanopd_lab.cluster.asking import PolicyError
from nanopd_lab.cluster.outputs import RequestFailedError
from nanopd_lab.core import FinishReason, Route
from nanopd_lab.router import Decision, JobView, Postponed, Role, WorkerView
from nanopd_lab.sim import ConstantTime, SimRequest, Simulator
from tests.cluster.symbolic import Harness, Sizes
from tests.engine.symbolic import rollout

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
SPLIT = Decision(Route("w0", "w1"))


def raises(job: JobView) -> Decision:
    routes: dict[int, Decision] = {}
    return routes[job.prompt_tokens]


WRONG: dict[str, tuple[Callable[[JobView], Any], str]] = {
    "raises": (raises, r"failed to choose a route: KeyError: 21 \(test_policy_errors\.py, line \d+, in raises\)"),
    "unknown worker": (lambda job: Decision(Route("w0", "w7")), r"chose w0→w7.* legal are w0→w1"),
    "wrong role": (lambda job: Decision(Route("w1", "w0")), "the roles or the load of the workers do not allow"),
    "role takes the route away": (
        lambda job: Decision(Route("w0", "w1"), "", (("w1", Role.PREFILL),)),
        "the roles or the load",
    ),
    "role of nobody": (lambda job: Decision(Route("w0", "w1"), "", (("w7", Role.MIXED),)), "gives 'w7' the role"),
    "no decision": (lambda job: Route("w0", "w1"), "must return a Decision, Postponed or None"),
    "no route": (lambda job: Decision("w0"), "failed to choose a route: AttributeError"),  # type: ignore[arg-type]
}  # fmt: skip


class Sometimes:
    """w0 → w1, but what `answers` has for a prompt of this length."""

    name = "mine"

    def __init__(self, answers: dict[int, Callable[[JobView], Any]]) -> None:
        self.answers = answers

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        answer = self.answers.get(job.prompt_tokens, lambda job: SPLIT)(job)
        return answer if answer is not SPLIT or len(workers) == 2 else None  # one is full


def prompt(tokens: int) -> list[int]:
    return [1 + i % 5 for i in range(tokens)]


@pytest.mark.parametrize("way", WRONG)
def test_only_the_request_fails_and_the_error_names_the_policy(way: str) -> None:
    answer, words = WRONG[way]
    harness = Harness(Sometimes({21: answer}), [Role.PREFILL, Role.DECODE], Sizes(num_blocks=16, budget=4))
    harness.step()
    for name, tokens in (("before", 20), ("wrong", 21), ("after", 22)):
        harness.submit(name, prompt(tokens), PARAMS)
    harness.run()
    error = str(harness.ends["wrong", 0].error)
    assert error.startswith("policy mine ")
    assert re.search(words, error), error
    assert harness.settled["wrong", 0].path.attempts == []
    assert [view.role for view in harness.controller.views()] == [Role.PREFILL, Role.DECODE]
    for name, tokens in (("before", 20), ("after", 22)):
        assert harness.tokens[name, 0] == rollout(prompt(tokens), PARAMS, 0)
        assert harness.ends[name, 0].finish_reason is FinishReason.LENGTH


@given(
    st.lists(st.sampled_from(["fine", "wait", "postpone", *WRONG]), min_size=1, max_size=25),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_whatever_it_answers_each_request_ends_and_nothing_leaks(ways: list[str], per_turn: int) -> None:
    """It also puts jobs off and has them wait, which must not lose those behind them that fail."""
    asked: dict[int, int] = {}

    def later(answer: Any) -> Callable[[JobView], Any]:
        def found(job: JobView) -> Any:
            asked[job.prompt_tokens] = asked.get(job.prompt_tokens, 0) + 1
            return answer if asked[job.prompt_tokens] == 1 else SPLIT

        return found

    kinds: dict[str, Callable[[JobView], Any]] = {
        "wait": later(None), "postpone": later(Postponed()), "fine": lambda job: SPLIT,
        **{name: answer for name, (answer, _) in WRONG.items()},
    }  # fmt: skip
    policy = Sometimes({5 + number: kinds[way] for number, way in enumerate(ways)})
    harness = Harness(policy, [Role.PREFILL, Role.DECODE], Sizes(num_blocks=32, budget=8, seqs=3))
    harness.step()
    for number in range(len(ways)):
        harness.submit(f"r{number}", prompt(5 + number), PARAMS)
        if number % per_turn == 0:
            harness.step()
        harness.check()
    harness.run()
    for number, way in enumerate(ways):
        end = harness.ends[f"r{number}", 0]
        assert (end.finish_reason is FinishReason.ERROR) == (way in WRONG)
        if way not in WRONG:
            assert harness.tokens[f"r{number}", 0] == rollout(prompt(5 + number), PARAMS, 0)


def test_an_end_that_it_cannot_take_in_stops_nobody() -> None:
    class Deaf(Sometimes):
        told = 0

        def finished(self, prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
            self.told += 1
            raise KeyError("length")

    policy = Deaf({})
    harness = Harness(policy, [Role.PREFILL, Role.DECODE], Sizes())
    harness.step()
    for number in range(3):
        harness.submit(f"r{number}", prompt(9 + number), PARAMS)
    with pytest.warns(UserWarning, match=r"policy mine failed to take in the end .*KeyError: 'length'"):
        harness.run()
    assert policy.told == 1
    assert all(end.finish_reason is FinishReason.LENGTH for end in harness.ends.values())


@pytest.mark.parametrize("launcher", ["inline", "process"])
def test_a_cluster_serves_on(launcher: str) -> None:
    policy = Sometimes({21: raises})
    config = ClusterConfig(
        "random:tiny", policy=policy, launcher=launcher, threads=1, engine={"kv_cache_memory_bytes": 1 << 20}
    )
    with Cluster(config) as cluster:
        with pytest.raises(RequestFailedError, match=r"prompt 1: policy mine failed .* KeyError"):
            cluster.generate([prompt(20), prompt(21), prompt(22)], PARAMS, use_tqdm=False)
        outputs = cluster.generate([prompt(20), prompt(22)], PARAMS, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [6, 6]
        names = [cluster.submit(prompt(tokens), PARAMS) for tokens in (20, 21)]
        ends = {output.request_id: output for output in cluster.stream(names)}
        assert all(output.settled for output in ends.values())
        assert "policy mine failed" in str(ends[names[1]].outputs[0].error)
        assert ends[names[1]].outputs[0].token_ids == []
        cluster.check_integrity()
        assert cluster.controller.num_unsettled == 0


def test_a_simulation_raises_what_the_policy_raised() -> None:
    requests = [SimRequest("a", 0.0, 20, 3), SimRequest("b", 0.0, 21, 3)]
    with pytest.raises(KeyError):
        Simulator(Sometimes({21: raises}), [Role.PREFILL, Role.DECODE], ConstantTime(1.0), requests).run()
    policy = Sometimes({21: WRONG["unknown worker"][0]})
    with pytest.raises(PolicyError, match="w0→w7"):
        Simulator(policy, [Role.PREFILL, Role.DECODE], ConstantTime(1.0), requests).run()
