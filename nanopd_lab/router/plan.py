"""How many workers should prefill and how many decode: what each layout can be expected to serve, by formula.

    Workload: requests a second, how long prompts and outputs are
    Planner(outlook, workload).forecast(Layout(5, 3), rate) -> share of requests that get what they were promised
    Planner(outlook, workload).capacity(Layout(5, 3))       -> the rate at which that share is just reached

First order (notebook 08): n_P/n_D = λE[T_prefill]/ρ_P : λE[out]·t(B*)/(B*·ρ_D), with B* the largest batch whose steps
meet TPOT. This goes one order further, as objectives are about each request and not about means:

prefill  M/G/c: c workers, the one with the least work left is chosen; a service is the sum of the prompt's chunks. Under
         load prompts share steps, which saves some reading of weights and costs the first of them some waiting.
decode   the batch B settles where the tokens asked for are the tokens made, λE[out] = B/t(B) (Little's law); it swings as
         that of a processor that is shared, Var B = B/(1 − g) with g the share of a step that grows with B.
mixed    every step carries the decodes. A prompt takes steps of t(B, chunk), and stretches those of others: with a share
         u of time that is prefill's alone, a token takes t(B)/(1 − u), and spreads as a delayed busy period does.
link     the last chunk's blocks are waited for, and what of the others a slow link has left; cards are shared.

Not in it: bursts (arrivals are Poisson), correlation of prompt and output lengths, preemption, prefix caches, requests
of unequal promises. `sim` has them all; this answers in under a millisecond.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nanopd_lab.cost.iteration import SHORT_CHUNK, IterationModel, StepFeatures
from nanopd_lab.router.outlook import Outlook
from nanopd_lab.router.queueing import Array, Waiting, normal_below, sum_below, waiting

STRATA = 32
SHARE = 0.9


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

    def __str__(self) -> str:
        return f"{self.mixed} mixed" if self.mixed else self.policy


def layouts(workers: int) -> Iterator[Layout]:
    """All of them: mixed, then every xPyD."""
    yield Layout(mixed=workers)
    for prefills in range(1, workers):
        yield Layout(prefills, workers - prefills)


@dataclass(frozen=True)
class Workload:
    """What is asked for. `prompts` and `outputs` are tokens, a sample in which each stands for as many requests.

    Raises:
        ValueError: no lengths, or one below 1.
    """

    prompts: tuple[float, ...]
    outputs: tuple[float, ...]

    def __post_init__(self) -> None:
        for name, values in vars(self).items():
            if not values or not min(values) >= 1:
                raise ValueError(f"{name} are {values[:3]}; give one length or more, each at least 1 token")

    @classmethod
    def of(cls, prompts: Iterable[float], outputs: Iterable[float], strata: int = STRATA) -> Workload:
        """Of any number of lengths: each sample is sorted and cut into `strata` equal parts, whose means it keeps."""
        return cls(_strata(sorted(prompts), strata), _strata(sorted(outputs), strata))


def _strata(lengths: Sequence[float], strata: int) -> tuple[float, ...]:
    if len(lengths) <= strata:
        return tuple(lengths)
    if lengths[0] == lengths[-1]:
        return (lengths[0],)
    return tuple(float(part.mean()) for part in np.array_split(np.asarray(lengths, float), strata))


class Forecast(NamedTuple):
    """What is expected of a layout at a rate, where it does not change any more.

    rate:       requests a second
    attainment: share of requests that get all they were promised: the product of the four below
    ttft_met, tpot_met, e2e_met: share that meets this objective (1 if there is none)
    room_met:   share of time in which everybody finds a place and blocks
    ttft_s, tpot_s: means
    prefill_load: share of time that prefill takes, where it runs; batch: sequences that a worker decodes
    link_load:  of the busiest network cards
    """

    layout: Layout
    rate: float
    attainment: float = 0.0
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
    def goodput(self) -> float:
        """Requests a second that get what they were promised."""
        return self.rate * self.attainment

    @property
    def limit(self) -> str:
        """What keeps most requests from it: "prefill", "decode", "KV room" or "link"."""
        if self.link_load >= 1:
            return "link"
        parts = {
            "prefill": self.ttft_met,
            "decode": min(self.tpot_met, self.e2e_met),
            "KV room": self.room_met,
        }
        return min(parts, key=parts.__getitem__)


class _Prefill(NamedTuple):
    """Prompts beside a decode batch, `[prompts]` each, s.

    alone, full:   steps of a prompt that has them for itself; its part of steps that are full of prompts
    alone_s, full_s: of both, what the decodes would not have taken without it
    """

    alone: Array
    full: Array
    alone_extra: Array
    full_extra: Array


class Planner:
    """See the module. What depends on neither rate nor layout is worked out once and kept.

    Args:
        outlook: how long steps and pulls take, and what is promised
        workload: lengths
        max_num_seqs, num_blocks: of each worker; 0 blocks: as many as are asked for
        ahead: workers plan a step while the one before runs, as `SimConfig.ahead`
        share: of the requests that must get what they were promised, for `capacity`
    """

    def __init__(
        self,
        outlook: Outlook,
        workload: Workload,
        *,
        max_num_seqs: int = 256,
        num_blocks: int = 0,
        ahead: bool = True,
        share: float = SHARE,
    ) -> None:
        self.outlook, self.workload, self.share = outlook, workload, share
        self.ahead = ahead
        self.prompts = np.asarray(workload.prompts, float)
        self.outputs = np.asarray(workload.outputs, float)
        self.gaps = np.maximum(self.outputs - 1.0, 0.0)  # tokens behind the first, each a decode step
        self.mean_prompt, self.mean_gaps = float(self.prompts.mean()), float(self.gaps.mean())
        steps = self.mean_gaps or 1.0
        self.context = (
            self.mean_prompt + 1 + float((self.gaps**2).mean()) / (2 * steps)
        )  # of a sequence that decodes
        places = float(max_num_seqs)
        if num_blocks:
            places = min(places, num_blocks * outlook.block_size / (self.context + outlook.block_size / 2))
        self.places = places
        self._prefills: dict[int, _Prefill] = {}

    # ---- decode steps ----------------------------------------------------------------------------------

    @cached_property
    def _batches(self) -> list[float]:
        most = max(2.0, self.places)
        return [1.0, *(most ** (i / 23) for i in range(1, 24))]

    @cached_property
    def _step_times(self) -> list[float]:
        """Of a decode step at each of `_batches`, over the batches around it: captured sizes make stairs."""
        found = []
        for batch in self._batches:
            swing = math.sqrt(batch) / 2
            near = [max(1.0, batch - swing), batch, batch + swing]
            found.append(
                sum(self.decode_step_s(round(each)) for each in near) / 3
                if swing >= 1
                else self.decode_step_s(round(batch))
            )
        return found

    @cached_property
    def _token_rates(self) -> list[float]:
        """Tokens a second of each of `_batches`; rising."""
        rates = [b / t for b, t in zip(self._batches, self._step_times, strict=True)]
        return [max(rates[: i + 1]) for i in range(len(rates))]

    def decode_step_s(self, batch: int) -> float:
        """Of a decode step of so many sequences of mean context."""
        return self.outlook.iteration.decode_seconds(batch, round(batch * self.context))

    def _step_s(self, batch: float) -> tuple[float, float]:
        """(a decode step's time at this batch, its growth for one sequence more)."""
        return _interpolate(self._batches, self._step_times, batch)

    def _batch_of(self, tokens_per_s: float) -> float:
        """The batch at which a worker makes so many tokens; infinite if it can't."""
        rates = self._token_rates
        if tokens_per_s >= rates[-1]:
            return math.inf
        if tokens_per_s <= rates[0]:
            return tokens_per_s / rates[0]
        return _interpolate(rates, self._batches, tokens_per_s)[0]

    # ---- prefill steps ---------------------------------------------------------------------------------

    def _prefill(self, batch: float) -> _Prefill:
        """Prompts beside so many decodes, between those of a grid that are worked out."""
        grid = _GRID
        place = max(0, bisect_right(grid, batch) - 1)
        if place + 1 >= len(grid):
            return self._prefill_at(grid[-1])
        low, high = grid[place], grid[place + 1]
        if batch == low:
            return self._prefill_at(low)
        part = (batch - low) / (high - low)
        one, two = self._prefill_at(low), self._prefill_at(high)
        return _Prefill(*(a + part * (b - a) for a, b in zip(one, two, strict=True)))

    def _prefill_at(self, batch: int) -> _Prefill:
        if (found := self._prefills.get(batch)) is None:
            found = self._prefills[batch] = self._work_out(batch)
        return found

    def _work_out(self, batch: int) -> _Prefill:
        iteration = self.outlook.iteration
        budget = max(1, self.outlook.max_num_batched_tokens - batch)
        context = batch * self.context
        decode = self.decode_step_s(batch) if batch else 0.0

        def step(tokens: float, prompts: float, pairs: float, past: float, short: float) -> float:
            return iteration.of_features(
                StepFeatures(
                    round(tokens + batch), max(1, round(prompts + batch)), pairs + context + batch / 2,
                    round(past + tokens + context + batch), max(1, round(prompts + batch)), short,
                )
            )  # fmt: skip

        alone, steps = [], []
        for prompt in self.workload.prompts:
            left, past, seconds, count = prompt, 0.0, 0.0, 0
            while left > 0:
                now = min(left, budget)
                pairs = now * (past + now / 2)
                seconds += step(now, 1, pairs, past, pairs if 1 < now < SHORT_CHUNK else 0.0)
                left, past, count = left - now, past + now, count + 1
            alone.append(seconds)
            steps.append(count)
        together = max(1.0, budget / self.mean_prompt)
        full_step = step(budget, together, 0.0, 0.0, 0.0)
        short = np.where(self.prompts < SHORT_CHUNK, iteration.short_pair_s, 0.0)
        full = self.prompts / budget * full_step + (iteration.pair_s + short) * self.prompts**2 / 2
        alone_s, count_s = np.asarray(alone), np.asarray(steps, float)
        full = np.minimum(full, alone_s)
        return _Prefill(
            alone_s,
            full,
            np.maximum(alone_s - count_s * decode, 0.0),
            np.maximum(full - self.prompts / budget * decode, 0.0),
        )

    # ---- layouts ---------------------------------------------------------------------------------------

    def forecast(self, layout: Layout, rate: float) -> Forecast:
        """What to expect of `layout` at `rate` requests a second.

        Raises:
            ValueError: a layout with no worker for some of the work, or a rate that is not positive.
        """
        if not rate > 0:
            raise ValueError(f"rate is {rate} requests/s; it must be positive")
        if layout.mixed:
            if layout.prefills or layout.decodes or layout.mixed < 1:
                raise ValueError(
                    f"{layout!r} has both kinds of workers; give mixed ones, or prefills and decodes"
                )
            return self._mixed(layout, rate)
        if min(layout.prefills, layout.decodes) < 1:
            raise ValueError(
                f"{layout!r}: at least one worker that prefills and one that decodes, or mixed ones"
            )
        return self._split(layout, rate)

    def _split(self, layout: Layout, rate: float) -> Forecast:
        slo = self.outlook.slo
        prefill = self._prefill_at(0)
        per_worker = rate / layout.prefills
        load, services = _shared(per_worker, prefill.alone, prefill.full)
        wait = waiting(layout.prefills, load, float(services.mean()), float((services**2).mean()))
        batch = self._batch_of(rate / layout.decodes * self.mean_gaps)
        link_load, handover = self._handover(layout, rate, services)
        if load >= 1 or batch >= self.places or link_load >= 1:
            return Forecast(
                layout,
                rate,
                0.0,
                float(load < 1),
                float(batch < self.places),
                1.0,
                float(batch < self.places),
                prefill_load=load,
                batch=batch,
                link_load=link_load,
            )
        step_s, growth = self._step_s(max(1.0, batch + 1 / layout.decodes))
        variance = _swing(batch, growth / step_s * batch, layout.decodes)
        # Blocks arrive during a step, and a worker that plans ahead has planned one more.
        handover += step_s * (0.5 + self.ahead) * min(1.0, batch)
        ttft_met = self._ttft_met(wait, services, prefill.full, load, 0.0)
        tpot_met, e2e_met, tpot = self._outputs_met(
            step_s, growth, variance, 0.0, 0.0, handover, wait.overall_s + float(services.mean())
        )
        room = self._room(batch, variance)
        return Forecast(
            layout, rate, ttft_met * tpot_met * e2e_met * room, ttft_met, tpot_met, e2e_met, room,
            wait.overall_s + float(services.mean()), tpot, load, batch, link_load,
        )  # fmt: skip

    def _mixed(self, layout: Layout, rate: float) -> Forecast:
        per_worker = rate / layout.mixed
        batch = 0.0
        for _ in range(6):
            prefill = self._prefill(min(batch, self.places))
            load, services = _shared(per_worker, prefill.alone, prefill.full)
            part = min(load, 1.0)
            extra = part * prefill.full_extra + (1 - part) * prefill.alone_extra
            taken = per_worker * float(extra.mean())
            if taken >= 1:
                batch = math.inf
                break
            batch, before = self._batch_of(per_worker * self.mean_gaps / (1 - taken)), batch
            if abs(batch - before) < 1e-3 * batch or batch == math.inf:
                break
        if batch >= self.places or load >= 1 or taken >= 1:
            return Forecast(
                layout,
                rate,
                0.0,
                float(load < 1),
                float(batch < self.places),
                1.0,
                float(batch < self.places),
                prefill_load=load,
                batch=batch,
            )
        step_s, growth = self._step_s(max(1.0, batch + 1 / layout.mixed))
        wait = waiting(layout.mixed, load, float(services.mean()), float((services**2).mean()))
        variance = _swing(batch, growth / step_s * batch, layout.mixed)
        sync = step_s * (0.5 + self.ahead) * min(1.0, batch)
        ttft = wait.overall_s + float(services.mean()) + sync
        ttft_met = self._ttft_met(wait, services, prefill.full, load, sync)
        tpot_met, e2e_met, tpot = self._outputs_met(
            step_s, growth, variance, taken, per_worker * float((extra**2).mean()), 0.0, ttft
        )
        room = self._room(batch, variance)
        return Forecast(
            layout, rate, ttft_met * tpot_met * e2e_met * room, ttft_met, tpot_met, e2e_met, room,
            ttft, tpot, load, batch,
        )  # fmt: skip

    def _ttft_met(self, wait: Waiting, services: Array, full: Array, load: float, sync: float) -> float:
        """Share of prompts whose first token comes in time.

        Who waits shares its step with prompts that come meanwhile, up to a step's budget: waiting grows by as much.
        """
        limit = self.outlook.slo.ttft_s
        if limit == math.inf:
            return 1.0
        budget = self.outlook.max_num_batched_tokens
        slack = limit - services - sync
        others = np.maximum(0.0, (-self.prompts) % budget) * float(full.sum() / self.prompts.sum())
        return float(
            wait.within(np.where(slack > 0, np.maximum(slack / (1 + load), slack - others), slack)).mean()
        )

    def _outputs_met(
        self,
        step_s: float,
        growth: float,
        variance: float,
        taken: float,
        squares: float,
        handover: float,
        ttft: float,
    ) -> tuple[float, float, float]:
        """(share that meets TPOT, share that meets E2E, mean TPOT).

        Args:
            taken, squares: λE[X] and λE[X²] of the time X that a prompt takes from those that decode
            handover: from the first token on until the second can be computed
        """
        slo, gaps = self.outlook.slo, self.gaps
        some = gaps > 0
        work = gaps * step_s
        mean = work / (1 - taken) + handover
        # A window as long as a request sees two thirds of the batch's variance (all requests alike).
        spread = 2 / 3 * variance * (gaps * growth / (1 - taken)) ** 2 + work * squares / (1 - taken) ** 3
        tpot = float((mean[some] / gaps[some]).mean()) if some.any() else 0.0
        mean = np.where(some, mean, 1e-9)
        tpot_met = e2e_met = 1.0
        if slo.tpot_s < math.inf:
            tpot_met = float(np.where(some, sum_below(slo.tpot_s * gaps, mean, spread), 1.0).mean())
        if slo.e2e_s < math.inf:
            left = np.full_like(gaps, slo.e2e_s - ttft)
            e2e_met = float(np.where(some, sum_below(left, mean, spread), left > 0).mean())
        return tpot_met, e2e_met, tpot

    def _handover(self, layout: Layout, rate: float, services: Array) -> tuple[float, float]:
        """(load of the busiest cards, mean seconds from the first token on until all blocks are there)."""
        transfer, outlook = self.outlook.transfer, self.outlook
        if transfer is None:
            return 0.0, 0.0
        blocks = self.mean_prompt / outlook.block_size + 0.5
        nbytes = blocks * outlook.block_bytes
        sending = nbytes / transfer.bytes_per_s
        load = rate / min(layout.prefills, layout.decodes) * sending
        if load >= 1:
            return load, math.inf
        chunks = max(1.0, math.ceil(self.mean_prompt / outlook.max_num_batched_tokens))
        last = sending / chunks
        behind = max(0.0, (chunks - 1) * (last - float(services.mean()) / chunks))
        return load, transfer.setup_s + blocks / chunks * transfer.block_s + (last + behind) / (1 - load)

    def _room(self, batch: float, variance: float) -> float:
        z = np.asarray([(self.places - batch) / math.sqrt(max(variance, 1e-9))])
        return float(normal_below(z)[0])

    def capacity(self, layout: Layout) -> Forecast:
        """At the highest rate at which `share` of the requests still get what they were promised.

        A rate of (almost) 0 with an attainment below `share` means that it can't be had at any rate.
        """
        low, high = 0.0, self._ceiling(layout)
        least = self.forecast(layout, 1e-3 * high)
        if least.attainment < self.share:
            return least._replace(rate=0.0)
        best = least
        low, low_met, high_met = 1e-3 * high, least.attainment, 0.0
        for turn in range(24):
            if high - low < 2e-3 * high:
                break
            # False position gets near quickly, halving gets there surely.
            part = (low_met - self.share) / (low_met - high_met) if turn % 2 else 0.5
            rate = low + min(max(part, 0.02), 0.98) * (high - low)
            found = self.forecast(layout, rate)
            if found.attainment >= self.share:
                low, low_met, best = rate, found.attainment, found
            else:
                high, high_met = rate, found.attainment
        return best

    def _ceiling(self, layout: Layout) -> float:
        """A rate that cannot be served: prefill, decode or the links are full."""
        tokens_per_s = self._token_rates[-1]
        of_decode = tokens_per_s / self.mean_gaps if self.mean_gaps else math.inf
        of_prefill = 1 / float(self._prefill_at(0).full.mean())
        if layout.mixed:
            return layout.mixed * min(of_decode, of_prefill)
        found = min(layout.decodes * of_decode, layout.prefills * of_prefill)
        if self.outlook.transfer is not None:
            load, _ = self._handover(layout, 1.0, self._prefill_at(0).full)
            found = min(found, 1 / load if load else math.inf)
        return found

    def rank(self, candidates: Iterable[Layout], rate: float | None = None) -> list[Forecast]:
        """Best first: by the share that gets what it was promised at `rate`, or by capacity."""
        if rate is None:
            return sorted(map(self.capacity, candidates), key=lambda each: -each.rate)
        return sorted((self.forecast(each, rate) for each in candidates), key=lambda each: -each.attainment)


_GRID = (0, 1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> tuple[float, float]:
    """(y, its slope) at x between points of rising x; straight on behind the ends."""
    place = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
    while place and xs[place + 1] == xs[place]:
        place -= 1
    width = xs[place + 1] - xs[place]
    slope = (ys[place + 1] - ys[place]) / width if width else 0.0
    return ys[place] + slope * (x - xs[place]), slope


def _shared(rate: float, alone: Array, full: Array) -> tuple[float, Array]:
    """(load, services) of a worker whose prompts are alone in their steps while it is idle, and share them when it is
    busy: S = ρ·full + (1 − ρ)·alone, and ρ = λE[S]."""
    a, f = rate * float(alone.mean()), rate * float(full.mean())
    load = a / (1 + a - f) if f < 1 else f
    part = min(load, 1.0)
    return load, part * full + (1 - part) * alone


def _swing(batch: float, share: float, workers: int) -> float:
    """Variance of a worker's batch: that of a shared processor, evened out over workers by routing to the emptiest."""
    return batch / max(1 - share, 0.05) / workers + (0.5 if workers > 1 else 0.0)
