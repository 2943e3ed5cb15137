"""Policies in a simulation don't know how long outputs will be, and learn as they do in the engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nanopd_lab.router import Collocated, Decision, JobView, Role, WorkerView
from nanopd_lab.sim import ConstantTime, SimRequest, Simulator, Veiled


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
