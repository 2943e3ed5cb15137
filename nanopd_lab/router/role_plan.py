"""How many workers should prefill: the arrivals of the last while are served again under other roles, and compared.

A plan is made after the first arrivals, and again whenever so many have come; each decision thinks a little. What a
layout is worth is the share of requests that keep their objectives (`replay`), with short times to break ties. Roles
change if that gains more than a margin, and more than the outputs that run on a worker that is to prefill would lose:
hysteresis, so that a fleet on the edge between two layouts stays as it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.router.replay import (
    ReplayJob,
    Room,
    Running,
    StepCosts,
    decode_times,
    first_tokens,
    mixed_times,
    share,
)

if TYPE_CHECKING:
    from nanopd_lab.router.lengths import LengthPredictor
    from nanopd_lab.router.slo import Slo

GOLDEN = (math.sqrt(5) - 1) / 2
STRATA = 8  # output lengths that a forecast is replaced by
SERVERS = 4  # prefill workers that are looked at, of more
HOPELESS = 0.92  # of the objective: who would get his first token later than that lets others pass
LATENCY_WORTH = 0.05  # of short times, beside an objective that is kept


class PlanSettings(NamedTuple):
    """How a role plan is made.

    window: arrivals that are looked at
    first, every: arrivals before the first plan, and between two later ones at most (it doubles in between)
    replayed: requests of a replay, over all workers; the first `warm` of them are not looked at
    margin: of goodput, as a share of all requests, that a change has to gain
    horizon: arrivals for which a change is to pay
    haste, pace: parts of a plan that each decision works on, before the first plan and later
    """

    window: int = 128
    first: int = 12
    every: int = 64
    replayed: int = 256
    warm: int = 64
    margin: float = 0.03
    horizon: int = 200
    haste: int = 12
    pace: int = 3


class Load(NamedTuple):
    """What the workers have to do when a plan begins, all together.

    decoding, context: outputs under way, and their tokens in the cache
    backlog_s: of prompts
    """

    decoding: int
    context: float
    backlog_s: float
    room: Room


class RolePlan:
    """See the module.

    Args:
        costs: of steps
        slo: what is promised
        predictor: of output lengths
        settings: see there
    """

    def __init__(
        self, costs: StepCosts, slo: Slo, predictor: LengthPredictor, settings: PlanSettings | None = None
    ) -> None:
        self.costs, self.slo, self.predictor = costs, slo, predictor
        self.settings = settings or PlanSettings()
        self.latest_s = HOPELESS * slo.ttft_s
        self.plans = self.ended = 0
        self.mean_output = 200.0  # tokens, as they were forecast for the last plan
        self.worth: dict[int, float] = {}  # of the last plan: by number of prefill workers, 0 for mixed
        self._arrivals: deque[tuple[float, int, int]] = deque(maxlen=self.settings.window)
        self._count = 0
        self._next = self.settings.first
        self._thinking: Generator[None, None, int] | None = None

    def arrived(self, now: float, prompt_tokens: int, max_tokens: int) -> None:
        """A request has come."""
        self._arrivals.append((now, prompt_tokens, max_tokens))
        self._count += 1

    def has_ended(self) -> None:
        """A request has ended."""
        self.ended += 1
        if self.ended in (8, 24, 72):  # lengths are known a good deal better than before
            self._next = min(self._next, self._count)

    @property
    def due(self) -> bool:
        """True if a plan should begin."""
        return self._thinking is None and self._count >= self._next and len(self._arrivals) > 2

    def begin(self, workers: int, prefills: int, leftovers: Sequence[int], load: Load) -> None:
        """Start a plan.

        Args:
            prefills: workers that now only prefill; 0: all are mixed
            leftovers: outputs that would be left on workers that are to prefill, by the number of these
        """
        self._next = self._count + min(self.settings.every, max(self.settings.first, self._count // 2))
        self._thinking = self._plan(workers, prefills, leftovers, load)

    def think(self) -> int | None:
        """Go on a little. Returns how many workers should prefill (0: mixed), once that is known."""
        if self._thinking is None:
            return None
        try:
            for _ in range(self.settings.pace if self.plans else self.settings.haste):
                next(self._thinking)
        except StopIteration as stop:
            self._thinking = None
            self.plans += 1
            found: int = stop.value
            return found
        return None

    # ------------------------------------------------------------------ one plan

    def _plan(
        self, workers: int, prefills: int, leftovers: Sequence[int], load: Load
    ) -> Generator[None, None, int]:
        replay = _Replay(list(self._arrivals), self.predictor, self.ended)
        self.mean_output = replay.mean_output
        worth: dict[int, float] = {}

        def look(layout: int) -> Generator[None, None, float]:
            if layout not in worth:
                worth[layout] = yield from self._worth(replay, workers, prefills, layout, load)
            return worth[layout]

        yield from look(prefills)
        yield from look(0)
        seconds = sum(self.costs.prompt(prompt) for _, prompt, _ in replay.arrivals) / replay.span
        place = prefills or min(workers - 1, max(1, round(seconds / 0.75)))
        stride = max(1, workers // 16)
        while workers > 1:
            best = place
            for other in (place, place - stride, place + stride):
                if 1 <= other < workers:
                    yield from look(other)
                    if worth[other] > worth[best]:
                        best = other
            if best == place:
                if stride == 1:
                    break
                stride //= 2
            place = best
        self.worth = worth
        settings = self.settings
        best = max(worth, key=lambda each: (worth[each], -each))
        added = max(0, best - prefills)
        lost = leftovers[min(added, len(leftovers) - 1)] * worth[prefills] / settings.horizon
        return best if worth[best] - worth[prefills] > settings.margin + lost else prefills

    def _worth(
        self, replay: _Replay, workers: int, now_prefill: int, prefills: int, load: Load
    ) -> Generator[None, None, float]:
        costs, settings = self.costs, self.settings
        decodes = workers - prefills  # all, if mixed
        running = replay.running(load, max(decodes, workers - now_prefill))  # they stay where they are
        total = max(settings.replayed, 16 * workers)
        warm = settings.warm * total // settings.replayed
        jobs = replay.jobs(total, decodes)
        if prefills == 0:
            backlog_s = load.backlog_s / (now_prefill or workers)
            times = yield from mixed_times(costs, jobs, running, load.room, backlog_s, self.latest_s)
            rows = [(first, 0.0, rest) for first, rest in times]
        else:
            servers = min(prefills, SERVERS)
            thin = prefills / servers
            queued = replay.jobs(total, thin)
            cards = max(1, round(min(prefills, decodes) / thin))
            # What is queued stays where it is.
            busy = round(servers * min(prefills, now_prefill) / prefills) if now_prefill else servers
            backlogs = [load.backlog_s / (now_prefill or workers)] * busy + [0.0] * (servers - busy)
            firsts = yield from first_tokens(costs, queued, backlogs, cards, self.latest_s)
            lasts = yield from decode_times(costs, jobs, running, load.room)
            shared, last = decodes / thin, len(lasts) - 1
            places = [min(last, int(number / shared)) for number in range(len(firsts))]
            rows = [(*first, lasts[place]) for first, place in zip(firsts, places, strict=True)]
            jobs = [jobs[place] for place in places]
        skipped = warm * len(rows) // total
        return self._mean(rows[skipped:], jobs[skipped:])

    def _mean(self, times: Sequence[tuple[float, float, float]], jobs: Sequence[ReplayJob]) -> float:
        """Worth of requests with these (time to first token, to the handover's end, from there to the end)."""
        slo, total = self.slo, 0.0
        ideal = self.costs.decode(1, 0)
        prompt_s, ttft_s, tpot_s = self.costs.prompt, slo.ttft_s, slo.tpot_s
        for (first, moved, rest), (_, prompt, output) in zip(times, jobs, strict=True):
            rest += moved
            alone = prompt_s(prompt) + ideal * output
            quick = alone / (alone + first + rest)
            if slo.given:
                kept = share(first, ttft_s) * share(rest / max(1, output - 1), tpot_s)
                total += kept * share(first + rest, slo.e2e_s) + LATENCY_WORTH * quick
            else:
                total += quick
        return total / len(jobs)


class _Replay:
    """The arrivals of a window, again and again, with output lengths as they are forecast."""

    def __init__(
        self, arrivals: list[tuple[float, int, int]], predictor: LengthPredictor, ended: int
    ) -> None:
        self.arrivals = arrivals
        begun, ended = arrivals[0][0], arrivals[-1][0]
        self.span = max((ended - begun) * len(arrivals) / (len(arrivals) - 1), 1e-6)
        self.begun = begun
        # As long as little is known, the tail of a forecast is that of doubt, not of lengths.
        surely = (2 + ended) / (20 + ended)
        self._lengths: dict[int, list[int]] = {}
        self._jobs: list[ReplayJob] = []
        for _, prompt, most in arrivals:
            if (kind := prompt.bit_length()) not in self._lengths:
                forecast = predictor.predict(prompt, most)
                self._lengths[kind] = [
                    int(forecast.quantile(0.5 + surely * ((number + 0.5) / STRATA - 0.5)))
                    for number in range(STRATA)
                ]
        common = max(self._lengths, key=lambda kind: sum(p.bit_length() == kind for _, p, _ in arrivals))
        self._common = self._lengths[common]
        self.mean_output = sum(self._common) / STRATA

    def jobs(self, total: int, sharers: float) -> list[ReplayJob]:
        """What of the first `total` requests comes to one of so many that share them."""
        base = self._jobs
        if len(base) < total:
            size, known, begun = len(self.arrivals), self._lengths, self.begun
            for index in range(len(base), total):
                turn, place = divmod(index, size)
                time, prompt, _ = self.arrivals[place]
                output = known[prompt.bit_length()][int((index + 1) * GOLDEN % 1.0 * STRATA)]
                base.append(ReplayJob(turn * self.span + time - begun, prompt, output))
        if sharers == int(sharers):
            return base[: total : int(sharers)]
        return [base[int(number * sharers)] for number in range(int(total / sharers))]

    def running(self, load: Load, sharers: int) -> list[Running]:
        """Outputs under way at one of so many workers; long ones are met more often."""
        count = round(load.decoding / sharers)
        if not count:
            return []
        context = load.context / load.decoding
        lengths, total = self._common, sum(self._common)
        found, below, place = [], lengths[0], 0
        for number in range(count):
            while below < (number + 0.5) / count * total:
                place += 1
                below += lengths[place]
            left = max(1.0, lengths[place] * ((number + 1) * GOLDEN % 1.0))
            found.append(Running(context, left))
        return found
