"""Good routes of an instance that is too large to try all: local search, which starts from what policies did.

A step takes a request that was missed and changes one thing that could help it: its own route, the route of one that
was in its way (which may be given up), the two routes exchanged, the routes of all requests around it, which another
start had, or some other route near by; now and then several at once, so that there is a way from any plan to any
other. New workers are those with little to do at that time, in the simulation as it is. The change stays if the score
is not worse.

Where there are many requests it rolls over windows of them: steps simulate those of a window, the ones that were under
way when it begins, and some behind it. Whether what was found there stays is decided by a simulation of everything, so
that no score is an estimate. The search is deterministic by its seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from nanopd_lab.core import Route
from nanopd_lab.sim.oracle.instance import Instance, Outcome, Plan

KINDS = ("own", "other", "exchange", "splice", "any")
WEIGHTS = (4.0, 5.0, 1.0, 1.0, 1.0)
GIVE_UP = 0.15  # how often a request that is moved is given up
MORE = 0.25  # how often a change is followed by another one before it is judged
REACH = (4, 8, 16, 32)  # requests of a splice
WINDOW = 96  # requests that a window has, without those under way
STEPS = 40  # of a visit to a window


@dataclass(frozen=True)
class Found:
    """The best plan that was found.

    start:   what the search began with, the best one
    started: requests that it met
    effort:  requests simulated in all simulations together, by those of the instance
    gains:   (effort, requests met) at each improvement
    """

    outcome: Outcome
    start: str
    started: int
    effort: float
    gains: tuple[tuple[float, int], ...] = ()

    @property
    def met(self) -> int:
        """Requests that got what they were promised."""
        return self.outcome.score.met


def search_routes(
    instance: Instance,
    starts: Mapping[str, Outcome],
    simulations: int,
    seed: int = 0,
    bound: int | None = None,
    window: int = WINDOW,
) -> Found:
    """Improve the best of `starts`; what is found is never worse than any of them.

    Args:
        starts: by name, such as those of policies (`Instance.outcome`)
        simulations: how much may be simulated, in simulations of the whole instance
        bound: requests that can be met at most; the search ends there
        window: requests of one; an instance of twice as many or fewer is searched as a whole

    Raises:
        ValueError: no start, or an empty window.
    """
    if not starts or window < 1:
        raise ValueError(f"{len(starts)} starts, a window of {window}; give one at least, and 1 or more")
    name = max(starts, key=lambda name: (starts[name].score.met, -starts[name].score.lateness))
    search = _Search(
        instance,
        starts[name],
        [start.plan for other, start in starts.items() if other != name],
        random.Random(seed),
        len(instance.requests) if bound is None else bound,
        simulations,
    )
    if len(instance.requests) <= 2 * window:
        search.climb()
    else:
        search.roll(window)
    return Found(search.best, name, starts[name].score.met, search.effort, tuple(search.gains))


class _Search:
    """A search under way. `others` are plans to take pieces of; it ends at `most` requests met."""

    def __init__(
        self,
        instance: Instance,
        best: Outcome,
        others: Sequence[Plan],
        rng: random.Random,
        most: int,
        budget: float,
    ) -> None:
        self.instance, self.best, self.others, self.rng = instance, best, others, rng
        self.most, self.budget, self.effort = most, budget, 0.0
        self.gains: list[tuple[float, int]] = []

    @property
    def over(self) -> bool:
        return self.effort >= self.budget or self.best.score.met >= self.most

    def offer(self, plan: Plan) -> bool:
        """Simulate a plan, and keep it if it is not worse. True if it is kept."""
        self.effort += 1
        outcome = self.instance.follow(plan)
        if self.best.score.beats(outcome.score):
            return False
        if outcome.score.met > self.best.score.met:
            self.gains.append((self.effort, outcome.score.met))
        self.best = outcome
        return True

    def climb(self) -> None:
        """Change one thing after the other."""
        picture, tried = _Picture.of(self.instance, self.best), {self.best.plan}
        while not self.over:
            plan = _neighbour(self.instance, self.best, picture, self.others, self.rng)
            if plan in tried:
                self.effort += 0.1  # so that it ends
                continue
            tried.add(plan)
            if self.offer(plan):
                picture = _Picture.of(self.instance, self.best)

    def roll(self, window: int) -> None:
        """Climb in windows, which overlap by half, again and again; where most are missed comes first."""
        count, left = len(self.instance.requests), set[int]()
        while not self.over:
            left = left or {*range(0, count - window // 2, max(1, window // 2))}
            missed = {first: sum(first <= n < first + window for n in self.best.missed) for first in left}
            first = max(sorted(left), key=lambda each: missed[each])
            left.remove(first)
            if missed[first]:
                self.visit(first, min(count, first + window), first + window + window // 4)
            else:
                left.clear()  # none of the others has any either

    def visit(self, first: int, last: int, seen: int) -> None:
        """Climb among the requests `[first, last)`, with those up to `seen` behind them."""
        requests, best = self.instance.requests, self.best
        begin = requests[first].arrival
        inside = [
            number
            for number in range(min(len(requests), seen))
            if number >= first or (best.records[number].finished or begin) > begin
        ]
        part = replace(self.instance, requests=tuple(requests[number] for number in inside))
        start = part.follow([best.plan[number] for number in inside])
        others = [tuple(plan[number] for number in inside) for plan in self.others]
        share = len(inside) / len(requests)
        inner = _Search(
            part, start, others, self.rng, len(inside), min(STEPS, (self.budget - self.effort) / share)
        )
        inner.climb()
        self.effort += (inner.effort + 1) * share
        if inner.best is not start:
            plan = list(best.plan)
            for number, route in zip(inside, inner.best.plan, strict=True):
                plan[number] = route
            self.offer(tuple(plan))


# ---- what was going on ------------------------------------------------------------------------------


class _Span(NamedTuple):
    """A request on a worker from `begin` to `end`; `weight` is how much it disturbs others, in tokens."""

    request: int
    begin: float
    end: float
    weight: float


@dataclass(frozen=True)
class _Picture:
    """Who was where and when in a simulation; `causes`: the worker, begin and end of each missed request's trouble."""

    prefills: dict[str, list[_Span]]
    decodes: dict[str, list[_Span]]
    causes: dict[int, tuple[str, float, float]]

    @classmethod
    def of(cls, instance: Instance, outcome: Outcome) -> _Picture:
        prefills: dict[str, list[_Span]] = {name: [] for name in instance.names}
        decodes: dict[str, list[_Span]] = {name: [] for name in instance.names}
        causes: dict[int, tuple[str, float, float]] = {}
        late = {*outcome.missed}
        for number, (record, route) in enumerate(zip(outcome.records, outcome.plan, strict=True)):
            if route is None:
                continue  # in nobody's way, and needs a route more than anything else
            arrival = record.arrival
            first = record.first_token if record.first_token is not None else arrival
            finished = record.finished if record.finished is not None else first
            prefills[route.prefill].append(_Span(number, arrival, first, float(record.prompt_tokens)))
            decodes[route.decode].append(_Span(number, first, finished, float(record.output_tokens)))
            if number in late:
                slow_start = first - arrival > instance.slo.ttft_s
                causes[number] = (
                    (route.prefill, arrival, first) if slow_start else (route.decode, first, finished)
                )
        return cls(prefills, decodes, causes)

    def around(self, worker: str, begin: float, end: float) -> list[_Span]:
        """Those on the worker at that time."""
        return [
            span
            for span in (*self.prefills[worker], *self.decodes[worker])
            if span.begin < end and span.end > begin
        ]

    def load(self, worker: str, begin: float, end: float, but: int) -> float:
        """Tokens of prompts that it computes in that time, and decodes, which count as many as a step has room for."""
        prompts = sum(
            s.weight for s in self.prefills[worker] if s.begin < end and s.end > begin and s.request != but
        )
        outputs = sum(s.begin < end and s.end > begin and s.request != but for s in self.decodes[worker])
        return prompts + 64.0 * outputs


def _neighbour(
    instance: Instance, best: Outcome, picture: _Picture, others: Sequence[Plan], rng: random.Random
) -> Plan:
    plan = list(best.plan)
    _change(plan, instance, best, picture, others, rng)
    while rng.random() < MORE:
        _change(plan, instance, best, picture, others, rng)
    return tuple(plan)


def _change(
    plan: list[Route | None],
    instance: Instance,
    best: Outcome,
    picture: _Picture,
    others: Sequence[Plan],
    rng: random.Random,
) -> None:
    near = [1.05 - instance.excess(best.records[number]) for number in best.missed]
    number = rng.choices(best.missed, near)[0]  # those that miss by little are easier to help
    kind = rng.choices(KINDS, WEIGHTS)[0]
    if kind == "splice" and others:
        reach = rng.choice(REACH)
        first = max(0, number - rng.randrange(reach))
        plan[first : first + reach] = rng.choice(others)[first : first + reach]
        return
    moved = number
    if kind == "any":
        moved = rng.randrange(max(0, number - REACH[-1]), min(len(plan), number + REACH[0]))
    if kind in ("other", "exchange") and number in picture.causes:
        worker, begin, end = picture.causes[number]
        spans = [span for span in picture.around(worker, begin, end) if span.request != number]
        if spans:
            moved = rng.choices(spans, [span.weight for span in spans])[0].request
    if kind == "exchange" and moved != number:
        plan[number], plan[moved] = plan[moved], plan[number]
        return
    plan[moved] = _route(instance, best, picture, moved, plan[moved], rng)


def _route(
    instance: Instance, best: Outcome, picture: _Picture, moved: int, old: Route | None, rng: random.Random
) -> Route | None:
    """Another route for a request: one of its workers changes, or both; less loaded ones are likelier. Or it is given
    up, or taken up again."""
    record, names = best.records[moved], instance.names
    first = record.first_token if record.first_token is not None else record.arrival
    finished = record.finished if record.finished is not None else first
    if old is None:
        late = max(0.0, first - record.arrival - instance.slo.ttft_s)  # it would come sooner
        first, finished = first - late, finished - late
    elif rng.random() < GIVE_UP:
        return None

    def pick(begin: float, end: float, now: str) -> str:
        """The less loaded of two that are drawn, as often as not: the best one may be the wrong one."""
        free = [name for name in names if name != now] or [now]
        drawn = rng.sample(free, min(2, len(free)))
        if rng.random() < 0.25:
            return drawn[0]
        return min(drawn, key=lambda name: picture.load(name, begin, end, moved))

    what = rng.random()
    if old is not None and what < 0.3:
        return Route(pick(record.arrival, first, old.prefill), old.decode)
    if old is not None and what < 0.6:
        return Route(old.prefill, pick(first, finished, old.decode))
    if what < 0.8:
        worker = pick(record.arrival, finished, old.prefill if old and old.collocated else "")
        return Route(worker, worker)
    before, after = old or ("", "")
    return Route(pick(record.arrival, first, before), pick(first, finished, after))
