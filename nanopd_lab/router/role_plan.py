"""How many workers should prefill: the arrivals of the last while are served again under other roles, and compared.

A plan is made after the first arrivals, whenever lengths are known a good deal better (unless the last one found
nothing to gain), and then after so many arrivals, sooner if decisions expect misses; each decision thinks a little.
What a layout is worth is the share of requests that keep their objectives (`replay`), less if its queues would grow for
ever (`long_run`), with short times to break ties, averaged over plans. Roles change if that gains more than a margin,
and more than the outputs that run on a worker that is to prefill would lose: hysteresis, so that a fleet on the edge
between two layouts stays as it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.router.arrivals import Arrival, Arrivals
from nanopd_lab.router.estimates import TPOT_DOUBT, miss
from nanopd_lab.router.fleetwide import Fleetwide
from nanopd_lab.router.long_run import LongRun, lasting
from nanopd_lab.router.mean_length import MeanLengths
from nanopd_lab.router.replay import ReplayJob, decode_times, first_tokens, mixed_times
from nanopd_lab.router.replay_worker import Room
from nanopd_lab.router.step_costs import StepCosts
from nanopd_lab.router.survival import corrected

if TYPE_CHECKING:
    from nanopd_lab.router.lengths import LengthPredictor
    from nanopd_lab.router.slo import Slo

SERVERS = 4  # prefill workers that are looked at, of more
HOPELESS = 0.92  # of the objective: who would get his first token later than that lets others pass
SLACK = 0.01  # of a gain that does not count, where several plans find one
LATENCY_WORTH = 0.05  # of short times, beside an objective that is kept
LEARNT = (4, 12, 24, 72)  # ends after which lengths are known a good deal better than before
LATELY = 32
# More or less work by this factor in the last so many arrivals: time for another plan; and by this one: what came
# before them is not looked at any more.
SHIFTED, OTHERWISE = 2.0, 3.0
BUSY = 0.9  # with prompts, at most
REPLAYED = 12  # requests of a replay for each worker, at least
SOON = 8  # arrivals, after so many of which a plan may be hurried up
# Requests that have come for a while are expected for so many times as long again (Lindy's law; a burst of 0.4 s whose
# outputs take 4 s is lost if it is far more).
GOES_ON = 3.0
FORGOTTEN = 0.5  # of the time to a first token makes a choice of long ago: who is on his way to a worker is known there
TOWARDS = 0.5  # a steady state, of the way from what runs now: who is judged comes and goes in between
NEWLY = 0.5  # of what a layout is worth is said by the plan of now: outputs and prompts of one are few
LOOKED_AT = 128  # requests of a replay that are judged, at most


class PlanSettings(NamedTuple):
    """How a role plan is made.

    window: arrivals that are looked at
    first, every: arrivals before the first plan, and between two later ones at most (it doubles in between)
    replayed: requests of a replay, over all workers; the first `warm` of them are not looked at
    margin: of goodput, as a share of all requests, that a change has to gain; doubt: before as many have ended as
        there were arrivals before the first plan
    least: that a layout must be worth to be changed to
    horizon: arrivals for which a change is to pay
    haste, pace: parts of a plan that each decision works on, before as many outputs have ended as a window has, and
        later
    """

    window: int = 128
    first: int = 12
    every: int = 192
    replayed: int = 96
    warm: int = 24
    margin: float = 0.03
    doubt: float = 0.12
    least: float = 0.3
    horizon: int = 500
    haste: int = 12
    pace: int = 4


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
        self.content = False  # the last plan found nothing to gain
        self.lengths = MeanLengths()
        self.mean_output = self.lengths.all.mean  # tokens, as forecast for the last plan
        self.worth: dict[int, float] = {}  # of the last plan: by number of prefill workers, 0 for mixed
        self._arrivals: deque[Arrival] = deque(maxlen=self.settings.window)
        self._count = 0
        self._next = self.settings.first
        self._begun = 0  # arrivals when the last plan began
        self._from = 0  # the first arrival that is like those of late
        self._first_s = 0.0  # when the first one came
        self._planned = 0.0  # tokens of prompts a second, that the last plan was made for
        self._gains: dict[int, float] = {}  # by layout, of the plans since roles changed (CUSUM)
        self._thinking: Generator[None, None, int] | None = None
        self._long_run = LongRun(self.settings.horizon)
        self._believed: dict[int, float] = {}  # what layouts are worth, by this plan and those before it

    def arrived(self, now: float, prompt_tokens: int, max_tokens: int) -> None:
        """A request has come."""
        if not self._count:
            self._first_s = now
        self._long_run.arrived(now, prompt_tokens)
        self._arrivals.append(Arrival(now, prompt_tokens, max_tokens))
        self._count += 1
        if self._count % (LATELY // 2) == 0 and self._planned and len(self._arrivals) > LATELY:
            ratio = self._tokens_per_s(LATELY) / self._planned
            if max(ratio, 1 / ratio) > SHIFTED:
                self._next = self._count
            if max(ratio, 1 / ratio) > OTHERWISE:
                self._from = self._count - LATELY
                some = list(self._arrivals)[-LATELY:]
                tokens = sum(each.prompt_tokens for each in some[1:])
                self._long_run.begin_again(tokens, some[-1].time - some[0].time)

    def _tokens_per_s(self, last: int) -> float:
        """Of prompts, over the last arrivals."""
        some = list(self._arrivals)[-last:]
        return sum(each.prompt_tokens for each in some) / max(some[-1].time - some[0].time, 1e-6)

    def has_ended(self, prompt_tokens: int, output_tokens: int) -> None:
        """A request has ended."""
        self.ended += 1
        if self.lengths.ended(prompt_tokens.bit_length(), output_tokens) in LEARNT and not self.content:
            self._next = min(self._next, self._count)

    @property
    def due(self) -> bool:
        """True if a plan should begin."""
        return self._thinking is None and self._count >= self._next and len(self._arrivals) > 2

    @property
    def may_hurry(self) -> bool:
        """True now and then, once the last plan is some arrivals old."""
        count = self._count
        return self._thinking is None and count % SOON == 0 and count >= self._begun + 2 * self.settings.first

    def hurry(self) -> None:
        """The fleet is in trouble: another plan is due."""
        self._next = self._count

    def begin(self, fleet: Fleetwide) -> None:
        """Start a plan."""
        self._planned, self._begun = self._tokens_per_s(LOOKED_AT), self._count
        self._next = self._count + min(self.settings.every, max(self.settings.first, self._count // 2))
        self._thinking = self._plan(fleet)

    def think(self) -> int | None:
        """Go on a little. Returns how many workers should prefill (0: mixed), once that is known."""
        if self._thinking is None:
            return None
        early = self.ended < self.settings.window
        try:
            for _ in range(self.settings.haste if early else self.settings.pace):
                next(self._thinking)
        except StopIteration as stop:
            self._thinking = None
            self.plans += 1
            found: int = stop.value
            return found
        return None

    @property
    def since(self) -> float:
        """When the first of the arrivals came that a plan for a few workers looks at, s."""
        return self._latest(1)[0].time

    def _latest(self, workers: int) -> list[Arrival]:
        """The newest arrivals that are like those of late, as many as a replay takes."""
        alike = self._count - self._from
        return list(self._arrivals)[-min(alike, max(self.settings.replayed, REPLAYED * workers)) :]

    # ------------------------------------------------------------------ one plan

    def _plan(self, fleet: Fleetwide) -> Generator[None, None, int]:
        settings, workers, now = self.settings, fleet.workers, fleet.prefills
        arrivals, ended = Arrivals(self._latest(workers)), self.ended
        arrivals.swell = self._long_run.tokens_per_s / arrivals.tokens_per_s
        yield
        yield from arrivals.forecast(self.predictor, self.lengths, fleet.ages)
        arrivals.set_mean(corrected(arrivals.mean_output, fleet.ends, fleet.ended, fleet.going))
        self.mean_output = arrivals.mean_output
        worth = self.worth = {now: (yield from self._worth(arrivals, fleet, now))}
        # It cannot get better by more than the margin.
        self.content = self.slo.given and worth[now] + settings.margin >= 1 + LATENCY_WORTH / 2
        if self.content:
            self._believed = {}
            return now

        def look(layout: int) -> Generator[None, None, float]:
            if layout not in worth:
                worth[layout] = yield from self._worth(arrivals, fleet, layout)
            return worth[layout]

        before = self._believed if ended >= settings.window else {}
        yield from look(0)
        seconds = arrivals.busy(self.costs)
        place = now or min(workers - 1, max(1, round(seconds / 0.75)))
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
        worth = {each: new + (1 - NEWLY) * (before.get(each, new) - new) for each, new in worth.items()}
        self._believed = worth
        # What a change costs: outputs that it leaves on workers that are to prefill.
        lost = {
            each: fleet.left_on(each)
            * self._spoilt(arrivals, fleet, seconds / each)
            * worth[now]
            / settings.horizon
            if each and each != now
            else 0.0
            for each in worth
        }
        # Of those that are about as good, the one that is nearest: to come from or to mixed workers changes all.
        # Before anything has ended there is nothing to stay near to.
        most = max(worth[each] - lost[each] for each in worth)
        most -= settings.margin / 2 if ended >= settings.first else 0.0
        near = [each for each in worth if worth[each] - lost[each] >= most]
        best = min(
            near,
            key=lambda each: (
                abs(each - now) if each and now else workers * (each != now),
                # What its neighbours are worth as well is not on an edge.
                -worth[each] - worth.get(each - 1, 0.0) - worth.get(each + 1, 0.0),
            ),
        )
        if best == now:
            return now
        margin = settings.margin if ended >= settings.first else settings.doubt
        self._gains = {each: self._gains.get(each, 0.0) + worth[each] - worth[now] - SLACK for each in worth}
        gains = (
            worth[best] >= settings.least
            and max(self._gains[best], worth[best] - worth[now]) > margin + lost[best]
        )
        if not gains:
            self._gains = {each: max(0.0, gain) for each, gain in self._gains.items()}
            return now
        self._gains = {}
        return best

    def _worth(self, arrivals: Arrivals, fleet: Fleetwide, prefills: int) -> Generator[None, None, float]:
        """Of a layout in which so many workers prefill."""
        costs, settings, load, now = self.costs, self.settings, fleet.load, fleet.prefills
        decodes = fleet.workers - prefills  # all, if mixed
        total = max(settings.replayed, REPLAYED * fleet.workers)
        # What runs or is queued stays where it is.
        sharers = max(decodes, fleet.workers - now)
        count = round(load.decoding / sharers)
        if self.ended >= settings.window:  # what a replay is too short to see, once lengths are known
            more = self._steady(arrivals, decodes, prefills == 0, load.room) - count
            count += round(TOWARDS * more) if more > 0 else 0
        context = load.context / load.decoding if load.decoding else arrivals.mean_context
        running = arrivals.running(count, context)
        backlog_s = load.backlog_s / (now or fleet.workers)
        going_s = GOES_ON * (self._arrivals[-1].time - self._first_s)
        if prefills == 0:
            some = min(fleet.workers, SERVERS)
            jobs = yield from arrivals.jobs(total, fleet.workers / some)
            busy = max(1, round(some * now / fleet.workers)) if now else some
            backlogs = [backlog_s] * busy + [0.0] * (some - busy)
            times = yield from mixed_times(
                costs, jobs, backlogs, running, load.room, self.latest_s, going_s, arrivals.swell
            )
            rows = [(first, 0.0, rest) for first, rest in times]
        else:
            jobs = yield from arrivals.jobs(total, decodes)
            servers = min(prefills, SERVERS)
            thin = prefills / servers
            queued = yield from arrivals.jobs(total, thin)
            busy = round(servers * min(prefills, now) / prefills) if now else servers
            backlogs = [backlog_s] * busy + [0.0] * (servers - busy)
            targets = max(1, round(decodes / thin))
            held = round((fleet.stuck + fleet.left_on(prefills)) / prefills)
            rest = arrivals.running(held, context)
            firsts = yield from first_tokens(costs, queued, backlogs, rest, targets, self.latest_s)
            # A decode worker is chosen when the request comes: the longer ago, the less is it idle as it was.
            life_s = arrivals.mean_output * costs.decode(1, arrivals.mean_context)
            waits = [first for first, _ in firsts if first < math.inf]
            known = life_s / (life_s + FORGOTTEN * sum(waits) / max(1, len(waits)))
            lasts = yield from decode_times(costs, jobs, running, load.room, decodes - 1, known)
            # Each first token goes with a decode of about its time; more of them would tell little more.
            step, last = max(1, len(firsts) // LOOKED_AT), len(lasts) - 1
            places = [min(last, int(number * thin / decodes)) for number in range(0, len(firsts), step)]
            rows = [(*first, lasts[place]) for first, place in zip(firsts[::step], places, strict=True)]
            jobs = [jobs[place] for place in places]
        skipped = settings.warm * len(rows) // settings.replayed
        found = yield from self._mean(rows[skipped:], jobs[skipped:])
        if prefills:
            in_time = lasting(arrivals.pressure(costs) / prefills, self.latest_s - backlog_s, going_s)
            seen = sum(share(row[0], self.slo.ttft_s) for row in rows[skipped:]) / len(rows[skipped:])
            found *= min(1.0, in_time / max(seen, 1e-9))
        return found

    def _spoilt(self, arrivals: Arrivals, fleet: Fleetwide, busy: float) -> float:
        """The probability that an output misses its objectives beside prompts that take such a share of the time."""
        each = max(1, round(fleet.load.decoding / fleet.workers))
        pace_s = self.costs.decode(each, each * arrivals.mean_context) / (1 - min(busy, BUSY))
        long = miss(pace_s * arrivals.mean_output, self.slo.e2e_s, TPOT_DOUBT)
        return max(long, miss(pace_s, self.slo.tpot_s, TPOT_DOUBT))

    def _steady(self, arrivals: Arrivals, workers: int, mixed: bool, room: Room) -> int:
        """Outputs that a worker will decode at once if it goes on like this (Little's law), as far as it has room."""
        rate = len(arrivals.window) / arrivals.span * arrivals.swell / workers
        free = 1.0
        if mixed:
            free = max(0.2, 1 - arrivals.busy(self.costs) / workers)
        # A step serves no more of them than its budget; of workers whose sizes are unknown it is the only bound.
        most = min(self.costs.budget, room.max_num_seqs, room.kv_tokens / arrivals.mean_context)
        batch = 1.0
        for _ in range(4):
            pace_s = self.costs.decode(max(1, round(batch)), batch * arrivals.mean_context) / free
            batch = min(most, rate * arrivals.mean_output * pace_s)
        return int(batch)

    def _mean(
        self, times: Sequence[tuple[float, float, float]], jobs: Sequence[ReplayJob]
    ) -> Generator[None, None, float]:
        """Worth of requests with these (time to first token, to the handover's end, from there to the end)."""
        slo, costs, total, given = self.slo, self.costs, 0.0, self.slo.given
        ideal = costs.decode(1, 0)
        for number, ((first, moved, rest), (_, prompt, output)) in enumerate(zip(times, jobs, strict=True)):
            if number % 16 == 0:
                yield
            end = first + moved + rest
            alone = costs.prompt(prompt) + ideal * output
            quick = alone / (alone + end)
            if not given:
                total += quick
                continue
            kept = share(first, slo.ttft_s)
            if kept and output > 1:  # one token is there as the prompt is, and isn't handed over
                kept *= share((moved + rest) / (output - 1), slo.tpot_s) * share(end, slo.e2e_s)
            elif kept:
                kept *= share(first, slo.e2e_s)
            total += kept + LATENCY_WORTH * quick
        return total / max(1, len(jobs))


def share(value: float, objective: float, width: float = 0.1) -> float:
    """How surely `value` keeps an objective: 1 well below, 0 well above, a straight line between."""
    if objective == math.inf:
        return 1.0
    found = 0.5 + (1.0 - value / objective) / (2 * width)
    return 1.0 if found > 1.0 else found if found > 0.0 else 0.0
