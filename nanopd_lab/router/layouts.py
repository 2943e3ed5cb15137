"""What a planner is asked and what it answers: layouts of workers, the lengths of requests, a forecast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

STRATA = 32


class Layout(NamedTuple):
    """So many workers that prefill, that decode, and that do both."""

    prefills: int = 0
    decodes: int = 0
    mixed: int = 0

    @property
    def workers(self) -> int:
        return sum(self)

    @property
    def policy(self) -> str:
        """The name by which `create_policy` knows it."""
        return "collocated" if self.mixed else f"{self.prefills}p{self.decodes}d"

    def check(self) -> None:
        """Raises ValueError unless every kind of work has a worker, and mixed workers are among themselves."""
        split = min(self.prefills, self.decodes) >= 1 and not self.mixed
        mixed = self.mixed >= 1 and not (self.prefills or self.decodes)
        if not split and not mixed:
            raise ValueError(
                f"{self!r} is no layout; give mixed workers only, or one or more that prefill and that decode"
            )

    def __str__(self) -> str:
        return f"{self.mixed} mixed" if self.mixed else self.policy


def layouts(workers: int) -> Iterator[Layout]:
    """All of so many workers: mixed, then every xPyD."""
    yield Layout(mixed=workers)
    for prefills in range(1, workers):
        yield Layout(prefills, workers - prefills)


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens: two samples in each of which every length stands for as many requests.

    Raises:
        ValueError: no lengths, or one below 1.
    """

    prompts: tuple[float, ...]
    outputs: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if not values or not min(values) >= 1:
                raise ValueError(
                    f"{name} are {values[:3]}; give one length or more, each of at least 1 token"
                )

    @classmethod
    def of(cls, prompts: Iterable[float], outputs: Iterable[float], strata: int = STRATA) -> Workload:
        """Of any number of lengths: each sample is sorted and cut into `strata` equal parts, whose means it keeps."""
        return cls(_strata(sorted(prompts), strata), _strata(sorted(outputs), strata))


def _strata(lengths: Sequence[float], strata: int) -> tuple[float, ...]:
    if lengths and lengths[0] == lengths[-1]:
        return (lengths[0],)
    if len(lengths) <= strata:
        return tuple(lengths)
    # A length may lie in two parts: the sum up to each cut, also between lengths.
    count = len(lengths)
    sums = np.interp(
        np.linspace(0, count, strata + 1), np.arange(count + 1), np.concatenate(([0.0], np.cumsum(lengths)))
    )
    return tuple((np.diff(sums) * strata / count).tolist())


class Forecast(NamedTuple):
    """What is expected of a layout at a rate, once it does not change any more.

    rate:       requests a second
    ttft_met, tpot_met, e2e_met: share that meets this objective (1 if there is none)
    room_met:   share of time in which everybody finds a place and blocks
    ttft_s, tpot_s: means
    prefill_load: share of time that prefill takes, where it runs; link_load: of the busiest network cards
    batch:      sequences that a worker decodes
    """

    layout: Layout
    rate: float
    ttft_met: float = 0.0
    tpot_met: float = 0.0
    e2e_met: float = 0.0
    room_met: float = 0.0
    ttft_s: float = math.inf
    tpot_s: float = math.inf
    prefill_load: float = 0.0
    batch: float = 0.0
    link_load: float = 0.0

    @property
    def attainment(self) -> float:
        """Share of requests that get all they were promised, as if the four had nothing to do with each other."""
        return self.ttft_met * self.tpot_met * self.e2e_met * self.room_met

    @property
    def goodput(self) -> float:
        """Requests a second that get what they were promised."""
        return self.rate * self.attainment

    @property
    def limit(self) -> str:
        """What keeps most requests from it: "TTFT", "TPOT", "E2E", "KV room" or "link"."""
        if self.link_load >= 1:
            return "link"
        met = {"TTFT": self.ttft_met, "TPOT": self.tpot_met, "E2E": self.e2e_met, "KV room": self.room_met}
        return min(met, key=met.__getitem__)
