"""How fast one worker decodes and prefills, as tables of a cost model over the batch: for formulas that ask often."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nanopd_lab.cost.iteration import SHORT_CHUNK, StepFeatures
from nanopd_lab.router.layouts import Workload
from nanopd_lab.router.outlook import Outlook
from nanopd_lab.router.queueing import Array

POINTS = 24  # of the tables over the batch
BESIDE = (0, 1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # batches beside which prompts are worked out


class PromptTimes(NamedTuple):
    """Seconds of prompts beside a decode batch, `[prompts]` each.

    alone, full: the steps of a prompt that has them for itself; its part of steps that are full of prompts
    alone_extra, full_extra: what of it those that decode would not have taken without it
    """

    alone: Array
    full: Array
    alone_extra: Array
    full_extra: Array


class WorkerTimes:
    """See the module. Built once for lengths and a cost model; says nothing of waiting.

    Args:
        max_num_seqs, num_blocks: of the worker; 0 blocks: as many as are asked for

    prompts, gaps: `[n]` prompt lengths, and decode steps of an output: its tokens behind the first
    context: mean tokens in the cache of a sequence that decodes
    places: sequences that find room
    """

    def __init__(self, outlook: Outlook, workload: Workload, max_num_seqs: int, num_blocks: int) -> None:
        self.outlook = outlook
        self.prompts = np.asarray(workload.prompts, float)
        self.gaps = np.maximum(np.asarray(workload.outputs, float) - 1.0, 0.0)
        self.mean_prompt, self.mean_gaps = float(self.prompts.mean()), float(self.gaps.mean())
        # A long output is seen more often, and half done on average.
        half = float((self.gaps**2).mean()) / (2 * self.mean_gaps) if self.mean_gaps else 0.0
        self.context = self.mean_prompt + 1 + half
        self.places = float(max_num_seqs)
        if num_blocks:
            tokens = num_blocks * outlook.block_size
            self.places = min(self.places, tokens / (self.context + outlook.block_size / 2))
        self._beside: dict[int, PromptTimes] = {}

    # ---- decode steps ----------------------------------------------------------------------------------

    def decode_step_s(self, batch: int) -> float:
        """Of so many sequences of mean context."""
        return self.outlook.iteration.decode_seconds(batch, round(batch * self.context))

    def step_s(self, batch: float) -> tuple[float, float]:
        """(a decode step's time at this mean batch, its growth for one sequence more)."""
        return _interpolate(self._batches, self._step_times, max(1.0, batch))

    def batch_of(self, tokens_per_s: float) -> float:
        """The mean batch at which the worker makes so many tokens; infinite if it can't."""
        rates = self._token_rates
        if tokens_per_s >= rates[-1]:
            return math.inf
        if tokens_per_s <= rates[0]:
            return tokens_per_s / rates[0]
        return _interpolate(rates, self._batches, tokens_per_s)[0]

    @property
    def most_tokens_per_s(self) -> float:
        """With all places taken."""
        return self._token_rates[-1]

    @cached_property
    def _batches(self) -> list[float]:
        most = max(2.0, self.places)
        return [most ** (point / (POINTS - 1)) for point in range(POINTS)]

    @cached_property
    def _step_times(self) -> list[float]:
        # Captured sizes make stairs, which a batch that swings goes up and down.
        found = []
        for batch in self._batches:
            swing = math.sqrt(batch) / 2
            near = (batch - swing, batch, batch + swing) if swing >= 1 else (batch,)
            found.append(sum(self.decode_step_s(round(each)) for each in near) / len(near))
        return found

    @cached_property
    def _token_rates(self) -> list[float]:
        rates = [batch / time for batch, time in zip(self._batches, self._step_times, strict=True)]
        return [max(rates[: place + 1]) for place in range(len(rates))]

    # ---- prompts ---------------------------------------------------------------------------------------

    def beside(self, batch: float) -> PromptTimes:
        """Prompts beside so many decodes, on a line between those of BESIDE."""
        place = min(bisect_right(BESIDE, batch) - 1, len(BESIDE) - 2)
        low, high = BESIDE[place], BESIDE[place + 1]
        if batch == low:
            return self._beside_exactly(low)
        part = min((batch - low) / (high - low), 1.0)
        ends = zip(self._beside_exactly(low), self._beside_exactly(high), strict=True)
        return PromptTimes(*(one + part * (two - one) for one, two in ends))

    def _beside_exactly(self, batch: int) -> PromptTimes:
        if (found := self._beside.get(batch)) is None:
            found = self._beside[batch] = self._work_out(batch)
        return found

    def _work_out(self, batch: int) -> PromptTimes:
        iteration = self.outlook.iteration
        budget = max(1, self.outlook.max_num_batched_tokens - batch)
        decode = self.decode_step_s(batch) if batch else 0.0
        alone, steps = [], []
        for prompt in self.prompts.tolist():
            left, past, seconds, count = prompt, 0.0, 0.0, 0
            while left > 0:
                now = min(left, budget)
                seconds += self._mixed_step_s(batch, now, past, 1.0)
                left, past, count = left - now, past + now, count + 1
            alone.append(seconds)
            steps.append(count)
        alone_s, count_s = np.asarray(alone), np.asarray(steps, float)
        # Of a full step everybody pays by tokens, and for attention what is his own.
        together = max(1.0, budget / self.mean_prompt)
        step = self._mixed_step_s(batch, budget, 0.0, together, attention=False)
        pair = iteration.pair_s + np.where(self.prompts < SHORT_CHUNK, iteration.short_pair_s, 0.0)
        parts = self.prompts / budget
        full = np.minimum(parts * step + pair * self.prompts**2 / 2, alone_s)
        return PromptTimes(
            alone_s,
            full,
            np.maximum(alone_s - count_s * decode, 0.0),
            np.maximum(full - parts * decode, 0.0),
        )

    def _mixed_step_s(
        self, batch: int, tokens: float, past: float, prompts: float, attention: bool = True
    ) -> float:
        """Of a step of `batch` decodes and `tokens` of `prompts` prompts behind `past` tokens of theirs."""
        context = batch * self.context
        pairs = tokens * (past + tokens / 2) if attention else 0.0
        sequences = max(1, round(prompts + batch))
        features = StepFeatures(
            max(1, round(tokens + batch)),
            sequences,  # each chunk draws, as the simulator has it
            pairs + context + batch / 2,
            round(past + tokens + context + batch),
            sequences,
            pairs if 1 < tokens < SHORT_CHUNK else 0.0,
        )
        return self.outlook.iteration.of_features(features)


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> tuple[float, float]:
    """(y, its slope) at x on the line through the points around it; x not decreasing."""
    place = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
    while place and xs[place + 1] == xs[place]:
        place -= 1
    width = xs[place + 1] - xs[place]
    slope = (ys[place + 1] - ys[place]) / width if width else 0.0
    return ys[place] + slope * (x - xs[place]), slope
