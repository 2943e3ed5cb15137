"""The arrivals of the last while as what is to come: again and again, with output lengths as they are forecast.

A pure function of the window, the predictor and the mean length: instead of random numbers there are multiples of the
golden ratio, which fill an interval evenly.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.router.replay import ReplayJob, Running

if TYPE_CHECKING:
    from nanopd_lab.router.lengths import LengthPredictor
    from nanopd_lab.router.mean_length import MeanLengths
    from nanopd_lab.router.step_costs import StepCosts

GOLDEN = (math.sqrt(5) - 1) / 2
STRATA = 16  # output lengths that a forecast is replaced by
SAMPLED = 8  # outputs under way of a kind that are looked at
SLICE = 16  # requests between two pauses
HALF_KNOWN = 30  # ends of a kind, after which its short outputs are half known


def certain(ended: int, count: int) -> list[float]:
    """`count` equally likely levels of a forecast after so many ends of its kind, in order.

    As long as little has ended, the tails of a forecast are those of doubt, not of lengths: they are left out.
    """
    surely = (2 + ended) / (8 + ended)
    return [0.5 + surely * ((number + 0.5) / count - 0.5) for number in range(count)]


def with_mean(shape: Sequence[float], mean: float, ended: int) -> list[float]:
    """Equally likely lengths, in order, made to have this mean after so many ends of their kind.

    The first to end are the short ones, so that at first all are taken to be too short. Later the short ones are known,
    those that can't make up for a handover; they stay, and the longest one gets what is missing.
    """
    total = sum(shape)
    missing = mean * len(shape) - total
    known = ended / (ended + HALF_KNOWN) if missing > 0.0 else 0.0
    scale = 1.0 + (1.0 - known) * missing / total
    found = [length * scale for length in shape]
    found[-1] += known * missing
    return found


class Arrival(NamedTuple):
    """When a request came (s), and tokens: of its prompt, and that its output may have."""

    time: float
    prompt_tokens: int
    max_tokens: int


class Arrivals:
    """See the module.

    Args:
        window: at least two
    """

    def __init__(self, window: Sequence[Arrival]) -> None:
        begun = window[0].time
        self.window = window
        self.span = max((window[-1].time - begun) * len(window) / (len(window) - 1), 1e-6)
        self.mean_output = 0.0  # tokens, as forecast
        self.swell = 1.0  # how many times as many tokens of prompts come in the long run
        self._times = [each.time - begun for each in window]
        self._lengths: dict[int, list[int]] = {}
        self._common: list[int] = []
        self._jobs: dict[int, ReplayJob] = {}
        self._busy: float | None = None

    def forecast(
        self, predictor: LengthPredictor, lengths: MeanLengths, ages: Mapping[int, Sequence[float]]
    ) -> Generator[None, None, None]:
        """Have output lengths: the shapes are the predictor's, the means those of `lengths`.

        Args:
            ages: tokens that outputs under way have produced, by the bits of their prompt's length
        """
        kinds: dict[int, int] = {}
        for _, prompt, most in self.window:
            kind = prompt.bit_length()
            kinds[kind] = kinds.get(kind, 0) + 1
            if kind not in self._lengths:
                own = sorted(ages.get(kind, ()))
                step = max(1, len(own) // SAMPLED)
                mean = lengths.look(kind, len(own), own[step // 2 :: step])
                ahead = predictor.predict(prompt, most)
                ended = lengths.of(kind).ends
                shape = [ahead.quantile(level) for level in certain(ended, STRATA)]
                scaled = with_mean(shape, mean, ended)
                self._lengths[kind] = [max(1, min(most, round(length))) for length in scaled]
                yield
        running = [age for each in ages.values() for age in each]
        step = max(1, len(running) // SAMPLED)
        lengths.all.look(len(running), sorted(running)[step // 2 :: step])
        self._common = self._lengths[max(kinds, key=lambda kind: kinds[kind])]
        self.mean_output = sum(count * lengths.of(kind).mean for kind, count in kinds.items()) / len(
            self.window
        )
        yield

    def set_mean(self, output_tokens: float) -> None:
        """Have output lengths with this mean, as far as they may be so long; their shapes stay. Before `jobs`."""
        scale, most = output_tokens / self.mean_output, max(each.max_tokens for each in self.window)
        for kind, lengths in self._lengths.items():
            self._lengths[kind] = [max(1, min(most, round(length * scale))) for length in lengths]
        self._common = [max(1, min(most, round(length * scale))) for length in self._common]
        self.mean_output = output_tokens

    @property
    def mean_context(self) -> float:
        """Tokens that an output has in the cache, half of its own among them."""
        return sum(each.prompt_tokens for each in self.window) / len(self.window) + self.mean_output / 2

    @property
    def tokens_per_s(self) -> float:
        """Of prompts."""
        return sum(each.prompt_tokens for each in self.window) / self.span

    def pressure(self, costs: StepCosts) -> float:
        """How many workers the prompts keep busy in the long run, where those that wait share steps."""
        mean = max(1, round(self.tokens_per_s * self.span / len(self.window)))
        return costs.queued(mean, len(self.window)) / self.span * self.swell

    def busy(self, costs: StepCosts) -> float:
        """How many workers the prompts would keep busy, one after the other."""
        if self._busy is None:
            self._busy = sum(costs.prompt(each.prompt_tokens) for each in self.window) / self.span
        return self._busy

    def jobs(self, total: int, sharers: float) -> Generator[None, None, list[ReplayJob]]:
        """What of the first `total` requests comes to one of so many that share them, each of which gets one in turn,
        but not the same place of every turn."""
        found, size = [], len(self.window)
        for number in range(int(total / sharers)):
            index = int((number + number * GOLDEN % 1.0) * sharers)
            job = self._jobs.get(index)
            if job is None:
                turn, place = divmod(index, size)
                prompt = self.window[place].prompt_tokens
                output = self._lengths[prompt.bit_length()][int((index + 1) * GOLDEN % 1.0 * STRATA)]
                job = self._jobs[index] = ReplayJob(turn * self.span + self._times[place], prompt, output)
            found.append(job)
            if number % SLICE == SLICE - 1:
                yield
        return found

    def running(self, count: int, context: float) -> list[Running]:
        """So many outputs under way, with so many tokens in the cache each; long ones are met more often."""
        lengths, total = self._common, sum(self._common)
        found, place, below = [], 0, lengths[0]
        for number in range(count):
            while below < (number + 0.5) / count * total:
                place += 1
                below += lengths[place]
            found.append(Running(context, max(1.0, lengths[place] * ((number + 1) * GOLDEN % 1.0))))
        return found
