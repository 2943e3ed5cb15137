"""What a benchmark sends, and when: one value for the real engine and for the simulator.

    workload = random_workload(50, Arrivals(rate=2.0), (Fixed(128), Fixed(32)), seed=0)
    Simulator(policy, roles, time, workload.requests).run()
    cluster.bench(workload)

Everything is drawn before the first request is sent, from one seed.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.sim.request_trace import read_trace
from nanopd_lab.sim.workload import AZURE_LIKE, SimRequest, Sizes, gamma_arrivals

_OWN, _SHARED = 0, 1  # kinds of random tokens


@dataclass(frozen=True)
class Fixed:
    """Always so many tokens."""

    tokens: int

    def draw(self, rng: random.Random) -> int:
        """That number."""
        return self.tokens


@dataclass(frozen=True)
class Uniform:
    """Every number of tokens from `low` to `high` alike.

    Raises:
        ValueError: not `1 <= low <= high`.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"lengths from {self.low} to {self.high} tokens; give 1 <= low <= high")

    def draw(self, rng: random.Random) -> int:
        """One of them."""
        return rng.randint(self.low, self.high)

    @classmethod
    def around(cls, tokens: int, ratio: float) -> Uniform:
        """From `tokens * (1 - ratio)` to `tokens * (1 + ratio)`, as `--random-range-ratio`; at least 1.

        Raises:
            ValueError: a ratio outside [0, 1), or less than 1 token.
        """
        if tokens < 1:
            raise ValueError(f"a length of {tokens} tokens; it must be at least 1")
        if not 0 <= ratio < 1:
            raise ValueError(f"range ratio {ratio}; it must lie in [0, 1)")
        return cls(max(1, math.floor(tokens * (1 - ratio))), math.ceil(tokens * (1 + ratio)))


@dataclass(frozen=True)
class Mixed:
    """One of several distributions, each as often as the others."""

    parts: tuple[Sizes, ...]

    def draw(self, rng: random.Random) -> int:
        """One of one of them."""
        return rng.choice(self.parts).draw(rng)


_SHORT, _LONG = Uniform(64, 256), Uniform(1024, 2048)
NAMED: Mapping[str, tuple[Sizes, Sizes]] = {
    "short": (_SHORT, Fixed(128)),
    "long": (_LONG, Fixed(128)),
    "mixed": (Mixed((_SHORT, _LONG)), Fixed(128)),
    "azure-like": AZURE_LIKE,
}
"""(prompt, output) by name. The first three are nanoPD's, of its Poisson benchmark."""


@dataclass(frozen=True)
class Workload:
    """Requests in order of arrival.

    name: of the data set
    arrivals: how their times were drawn; None: they are those of a trace
    prompts: token ids of each, where it has words; else they are random, and what requests share is the same
    ignore_eos: outputs have exactly the length asked for; otherwise that is the longest they may get
    source: of a trace: file and sha256

    Raises:
        ValueError: no requests, two of one name, or not as many prompts as requests.
    """

    requests: tuple[SimRequest, ...]
    name: str
    arrivals: Arrivals | None = None
    seed: int = 0
    prompts: tuple[Sequence[int], ...] = ()
    ignore_eos: bool = True
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.requests:
            raise ValueError("a workload needs at least one request")
        if len({each.request_id for each in self.requests}) < len(self.requests):
            raise ValueError("two requests have the same request_id; each needs its own")
        if self.prompts and len(self.prompts) != len(self.requests):
            raise ValueError(
                f"{len(self.prompts)} prompts for {len(self.requests)} requests; give one for each"
            )
        if any(a.arrival > b.arrival for a, b in itertools.pairwise(self.requests)):
            raise ValueError("the requests are not in order of arrival; sort them by it")

    @property
    def request_rate(self) -> float:
        """Requests a second: as asked for, or of a trace (or a ramp) its mean; infinite: all at once."""
        if self.arrivals is not None and self.arrivals.ramp_up is None:
            return self.arrivals.rate
        last = self.requests[-1].arrival
        return len(self.requests) / last if last else math.inf

    def tokens(self, vocab_size: int) -> list[list[int]]:
        """The prompts' token ids, in the order of the requests."""
        if self.prompts:
            return [list(each) for each in self.prompts]
        return [self._random(number, each, vocab_size) for number, each in enumerate(self.requests)]

    def _random(self, number: int, request: SimRequest, vocab_size: int) -> list[int]:
        import numpy as np

        def piece(kind: int, name: int, count: int) -> list[int]:
            rng = np.random.default_rng((self.seed % (1 << 64), kind, name))
            return [int(each) for each in rng.integers(vocab_size, size=count)]

        found = [token for name, count in request.shared() for token in piece(_SHARED, name, count)]
        return found + piece(_OWN, number, request.prompt_tokens - len(found))


def random_workload(
    count: int,
    arrivals: Arrivals,
    lengths: tuple[Sizes, Sizes],
    seed: int = 0,
    name: str = "random",
    prefix_tokens: int = 0,
    num_prefixes: int = 1,
) -> Workload:
    """Requests with (prompt, output) lengths drawn from `lengths`.

    Args:
        prefix_tokens, num_prefixes: as of `gamma_arrivals`

    Raises:
        ValueError: as `gamma_arrivals`, or no requests.
    """
    drawn = gamma_arrivals(
        count, arrivals.rate, lengths, seed, arrivals.burstiness, prefix_tokens, num_prefixes
    )
    if arrivals.ramp_up is not None:
        drawn = at_times(drawn, arrivals, seed)
    return Workload(tuple(drawn), name, arrivals, seed)


def trace_workload(
    path: Path,
    name: str = "trace",
    count: int | None = None,
    arrivals: Arrivals | None = None,
    seed: int = 0,
    speed: float = 1.0,
) -> Workload:
    """The first `count` requests of a trace, at its own times (`speed` times as fast) or at others.

    Args:
        path: of a layout that `read_trace` knows
        arrivals: take only the lengths from the trace

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `read_trace`; a count below 1, or a speed that is not positive.
    """
    if (count is not None and count < 1) or not 0 < speed < math.inf:
        raise ValueError(f"{count} requests at {speed} times the trace's speed; both must be positive")
    requests = read_trace(path)[:count]
    if arrivals is not None:
        requests = at_times(requests, arrivals, seed)
    else:
        requests = [replace(each, arrival=each.arrival / speed) for each in requests]
    return Workload(tuple(requests), name, arrivals, seed, source=source_of(path, speed=speed))


def at_times(requests: Sequence[SimRequest], arrivals: Arrivals, seed: int) -> list[SimRequest]:
    """The same requests, in the same order, at other times."""
    times = arrivals.times(
        len(requests), random.Random(f"{seed} arrivals")
    )  # not those that drew the lengths
    return [replace(each, arrival=when) for each, when in zip(requests, times, strict=True)]


def source_of(path: Path, **more: Any) -> dict[str, Any]:
    """Name and sha256 of a file, for the result."""
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **more}
