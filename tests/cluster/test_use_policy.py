"""A cluster changes its policy between requests: roles and routes follow, tokens and workers stay."""

from __future__ import annotations

import pytest

from nanopd_lab import SamplingParams
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.router import Collocated, Disaggregated, Role
from tests.cluster.test_cluster import inline

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPTS = [[3, 4, 5, 6, 7], list(range(40, 80))]


class Listening(Collocated):
    name = "listening"

    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []

    def finished(self, prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
        self.heard.append((prompt_tokens, output_tokens))


def test_routes_follow_and_tokens_stay() -> None:
    first, second = Listening(), Listening()
    with inline("random:tiny", policy=first) as cluster:
        tokens, hosts = [], dict(cluster.launcher.hosts)
        for policy, collocated in ((first, True), ("1p1d", False), (second, True), ("disaggregated", False)):
            if policy is not first:
                cluster.use_policy(policy)
            outputs = cluster.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert [output.paths[0].route.collocated for output in outputs] == [collocated] * 2
            tokens.append([output.outputs[0].token_ids for output in outputs])
            cluster.check_integrity()
            assert cluster.config.policy is policy
        assert all(each == tokens[0] for each in tokens)
        assert sorted(first.heard) == sorted(second.heard) == [(5, 6), (40, 6)]
        assert cluster.launcher.hosts == hosts  # nobody was started again
        assert {view.role for view in cluster.workers()} == {Role.MIXED}


def test_not_while_requests_are_under_way() -> None:
    with inline("random:tiny", policy="1p1d") as cluster:
        name = cluster.submit(PROMPTS[1], GREEDY)
        with pytest.raises(ValueError, match="1 requests are under way"):
            cluster.use_policy("collocated")
        assert cluster.config.policy == "1p1d"
        assert {view.role for view in cluster.workers()} == {Role.PREFILL, Role.DECODE}
        list(cluster.stream([name]))
        cluster.use_policy("collocated")


def test_a_wrong_policy_changes_nothing() -> None:
    with inline("random:tiny", policy="1p1d") as cluster:
        for wrong, match in (("2p2d", "needs 2 \\+ 2 workers"), ("best", "unknown policy")):
            with pytest.raises(ValueError, match=match):
                cluster.use_policy(wrong)
        assert cluster.config.policy == "1p1d"
        (output,) = cluster.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
        assert not output.paths[0].route.collocated


def test_not_with_a_worker_that_is_gone() -> None:
    controller = Controller(Collocated(), {"w0": Role.MIXED, "w1": Role.MIXED})
    controller.worker_down("w1", "died", 1.0)
    with pytest.raises(ValueError, match="w1 is gone"):
        controller.use_policy(Disaggregated(), {"w0": Role.PREFILL, "w1": Role.DECODE}, 2.0)
