"""What a simulation is asked to serve, and what breaks meanwhile."""

from __future__ import annotations

import math
import random
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from nanopd_lab.core import SamplingParams
from nanopd_lab.sim.arrivals import Arrivals

FIRST_PROMPT_TOKEN = (
    1 << 20
)  # prompts of different requests differ from it on, so that none is found in a cache
_BLANK = array("b", (0,))
HASH_TOKENS = 512  # as in Mooncake's traces


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request. Its tokens are made up; its output ends after exactly `output_tokens`.

    arrival, deadline: seconds
    prefix, prefix_tokens: the first so many tokens of the prompt are those of all requests with the same `prefix`
        (between 0 and `FIRST_PROMPT_TOKEN`), for the prefix cache
    hash_ids: of the prompt's blocks of `HASH_TOKENS` tokens, in the same range, as traces have them that tell what is
        shared; blocks of one id hold the same tokens, and what is behind the last is the prompt's own

    Raises:
        ValueError: a length below 1, a prefix longer than the prompt, an arrival that is negative or no number.
    """

    request_id: str
    arrival: float
    prompt_tokens: int
    output_tokens: int
    prefix: int = 0
    prefix_tokens: int = 0
    deadline: float = float("inf")
    hash_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(
                f"request {self.request_id!r} has {self.prompt_tokens} prompt and {self.output_tokens} output "
                "tokens; both must be at least 1"
            )
        if not 0 <= self.prefix_tokens <= self.prompt_tokens or not 0 <= self.prefix < FIRST_PROMPT_TOKEN:
            raise ValueError(
                f"request {self.request_id!r} has prefix {self.prefix} of {self.prefix_tokens} tokens; the number "
                f"must lie in [0, {FIRST_PROMPT_TOKEN}) and the length in [0, {self.prompt_tokens}]"
            )
        if self.hash_ids and not 0 <= min(self.hash_ids) <= max(self.hash_ids) < FIRST_PROMPT_TOKEN:
            raise ValueError(
                f"request {self.request_id!r} has hash ids from {min(self.hash_ids)} to {max(self.hash_ids)}; they "
                f"must lie in [0, {FIRST_PROMPT_TOKEN})"
            )
        if not 0 <= self.arrival < float("inf"):
            raise ValueError(
                f"request {self.request_id!r} arrives at {self.arrival} s; give a time from 0 on"
            )

    def prompt(self, number: int | None) -> array[int]:
        """Token ids; `number` makes them differ from those of other requests. None: nobody looks at them."""
        if number is None:
            return _BLANK * self.prompt_tokens
        found = array("i")
        for name, count in self.shared():
            found += array("i", (name,)) * count
        own = array("i", (FIRST_PROMPT_TOKEN + number,)) * (self.prompt_tokens - len(found))
        return found + own if found else own

    def shared(self) -> list[tuple[int, int]]:
        """(name, tokens) of the pieces at the prompt's beginning that other prompts may have too."""
        if not self.hash_ids:
            return [(self.prefix, self.prefix_tokens)] if self.prefix_tokens else []
        left = self.prompt_tokens
        return [
            (name, min(HASH_TOKENS, left - place * HASH_TOKENS))
            for place, name in enumerate(self.hash_ids[: -(-left // HASH_TOKENS)])
        ]

    def params(self) -> SamplingParams:
        """Greedy, to exactly the length asked for."""
        return _params(self.output_tokens)


@lru_cache(maxsize=1 << 16)
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


@dataclass(frozen=True)
class Kill:
    """Worker `worker` dies at `time`, and is back after `restart_after` seconds, or never."""

    time: float
    worker: str
    restart_after: float | None = None

    @classmethod
    def parse(cls, text: str) -> Kill:
        """From `w0@12.5` (dies at 12.5 s), or `w0@12.5+3` (and is back 3 s later). Raises ValueError."""
        match = re.fullmatch(r"(\w+)@([\d.]+)(?:\+([\d.]+))?", text)
        if match is None:
            raise ValueError(f"{text!r} names no kill; write w0@12.5, or w0@12.5+3 for a restart 3 s later")
        return cls(float(match[2]), match[1], float(match[3]) if match[3] else None)


class Sizes(Protocol):
    """A distribution of token counts."""

    def draw(self, rng: random.Random) -> int:
        """One of them, at least 1."""


@dataclass(frozen=True)
class Lengths:
    """Log-normal token counts: median and sigma of the logarithm, cut to `[1, most]`."""

    median: float
    sigma: float
    most: int

    def __post_init__(self) -> None:
        if not (0 < self.median < math.inf and 0 <= self.sigma <= 10):
            raise ValueError(
                f"log-normal lengths with median {self.median} and sigma {self.sigma}; the median must be positive, "
                "and sigma lie in [0, 10]"
            )

    def draw(self, rng: random.Random) -> int:
        """One of them."""
        return max(1, min(self.most, round(self.median * math.exp(self.sigma * rng.gauss(0.0, 1.0)))))


AZURE_LIKE = (Lengths(1020.0, 0.9, 8000), Lengths(129.0, 1.0, 2000))
"""Prompt and output: log-normal with means of about 1,500 and 205 tokens, the size of Azure's conversation trace of
2023 (means of 1,155 and 211; Patel et al., Splitwise, ISCA 2024)."""

AZURE_CODE_LIKE = (Lengths(1500.0, 0.8, 8000), Lengths(13.0, 1.2, 200))
"""Of the medians of Azure's coding trace (Splitwise): long prompts, short outputs, so many requests a GPU."""


def poisson_arrivals(
    count: int, rate: float, lengths: tuple[Sizes, Sizes], seed: int = 0
) -> list[SimRequest]:
    """`count` requests at exponential gaps, `rate` a second, with (prompt, output) lengths.

    Raises:
        ValueError: the rate is not positive.
    """
    if not rate > 0:
        raise ValueError(f"rate is {rate} requests/s; it must be positive")
    rng = random.Random(seed)
    now, found = 0.0, []
    for number in range(count):
        now += rng.expovariate(rate)
        found.append(SimRequest(f"r{number}", now, lengths[0].draw(rng), lengths[1].draw(rng)))
    return found


def gamma_arrivals(
    count: int,
    rate: float,
    lengths: tuple[Sizes, Sizes],
    seed: int = 0,
    burstiness: float = 1.0,
    prefix_tokens: int = 0,
    num_prefixes: int = 1,
) -> list[SimRequest]:
    """As `vllm bench serve` has them: gaps drawn from a gamma distribution of shape `burstiness` and mean `1 / rate`,
    then all stretched so that the last of `count` requests arrives at `count / rate`.

    Args:
        rate: requests a second; infinite: all at once
        burstiness: 1 is Poisson, less comes in bursts, more evenly
        prefix_tokens: that a prompt has in front of what is drawn from `lengths`, and shares with others
        num_prefixes: different ones, each of as many prompts as the others, in a random order

    Raises:
        ValueError: a rate or a burstiness that is not positive; a negative prefix, or no prefix.
    """
    if prefix_tokens < 0 or num_prefixes < 1:
        raise ValueError(f"{num_prefixes} prefixes of {prefix_tokens} tokens; give one or more, of 0 or more")
    rng = random.Random(seed)
    times = Arrivals(rate, burstiness).times(count, rng)
    prefixes = [number % num_prefixes for number in range(count)]
    if num_prefixes > 1:
        rng.shuffle(prefixes)
    return [
        SimRequest(
            f"r{number}",
            time,
            prefix_tokens + lengths[0].draw(rng),
            lengths[1].draw(rng),
            prefix,
            prefix_tokens,
        )
        for number, (time, prefix) in enumerate(zip(times, prefixes, strict=True))
    ]


def in_order(requests: Iterable[SimRequest]) -> list[SimRequest]:
    """By arrival; those of one instant as they were given."""
    return sorted(requests, key=lambda request: request.arrival)
