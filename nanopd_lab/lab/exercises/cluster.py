"""Exercises on workers that hand a sequence over."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from nanopd_lab.cluster.exchange import missing_blocks
from nanopd_lab.cluster.lease import Lease, LeaseTerms
from nanopd_lab.lab.checking import Steps, call, expect
from nanopd_lab.lab.pieces import with_piece
from nanopd_lab.lab.registry import Exercise

# ---------------------------------------------------------------------- what to pull


def check_missing(impl: Callable[[int, set[int], set[int]], list[int]]) -> int:
    """The worked examples, then every state of six positions, then long tables."""
    count = 0
    for offered, arrived, under_way in _offers():
        count += 1
        want = missing_blocks(offered, arrived, under_way)
        got = call(impl, offered=offered, arrived=arrived, under_way=under_way)
        expect(isinstance(got, list), "return a list of positions", want)
        for position in got:
            expect(type(position) is int, f"{position!r} is no position, which is an int", want)
            beyond = f"position {position} is not offered: the offer is the first {offered} block(s)"
            expect(0 <= position < offered, f"{beyond}, from 0 to {offered - 1}" if offered else beyond, want)
            expect(position not in arrived, f"block {position} has arrived already", want)
            expect(position not in under_way, f"block {position} is on its way already", want)
        expect(len(set(got)) == len(got), "a position is there twice: it would be copied twice", want)
        for position in want:
            why = f"block {position} is offered, not here and not on its way: without it the sequence never goes on"
            expect(position in got, why, want)
        expect(got == want, "positions go in rising order", want)
    return count


def _offers() -> Iterator[tuple[int, set[int], set[int]]]:
    yield 4, set(), set()
    yield 8, {0, 1, 2, 3}, set()
    yield 8, {0, 1}, {2, 3}
    yield 6, {0, 3}, {4}
    for offered in range(7):
        for state in itertools.product((0, 1, 2), repeat=6):
            yield offered, _positions(state, 1), _positions(state, 2)
    rng = random.Random(0)
    for _ in range(60):
        offered = rng.randint(20, 600)
        around = range(offered + rng.randint(-9, 9))
        few = set(rng.sample(around, rng.randint(0, 4)))
        many = {position for position in around if rng.random() < rng.choice((0.1, 0.5, 1.0))} - few
        yield (offered, many, few) if rng.random() < 0.5 else (offered, few, many)


def _positions(state: Collection[int], kind: int) -> set[int]:
    return {position for position, each in enumerate(state) if each == kind}


# ---------------------------------------------------------------------- leases


def check_lease(impl: Callable[[LeaseTerms, float], Lease]) -> int:
    """Lives told by hand, one mistake each; two leases side by side; then random ones against what is right."""
    for duration in (6.0, 30.0, 1.5):
        unit, terms = duration / 6, LeaseTerms(duration)
        for start in (100.0, 0.0):
            for life in _LIVES:
                _live(impl, terms, start, [(what, start + time * unit) for what, time in life])
    _two(impl)
    rng = random.Random(0)
    for _ in range(150):
        now = start = rng.choice((0.0, 7.25, 5000.5))
        random_life: list[tuple[str, float]] = []
        for _ in range(rng.randint(3, 14)):
            now += rng.choice((0.0, 0.25, 1.0, 3.75, 4.0, 5.0, 6.0))
            random_life.append((rng.choice(("renew", "renew", "expired")), now))
        _live(impl, LeaseTerms(rng.choice((6.0, 12.0))), start, random_life)
    return 6 * len(_LIVES) + 151


# Of a lease of 6 from 0 on: a renewal is good for 4. What is called, and when.
_LIVES: tuple[tuple[tuple[str, float], ...], ...] = (
    (("expired", 0), ("expired", 5), ("expired", 5.75), ("expired", 6), ("expired", 9)),
    (("renew", 5), ("expired", 6), ("expired", 8.75), ("expired", 9)),
    (("renew", 1), ("expired", 5.75), ("expired", 6)),
    (("renew", 2), ("expired", 5.75), ("expired", 6)),
    (("renew", 3), ("expired", 6), ("expired", 7)),
    (("renew", 5), ("renew", 5), ("expired", 8.75), ("expired", 9)),
    (("renew", 3), ("renew", 4), ("renew", 5), ("renew", 6), ("expired", 9.75), ("expired", 10)),
    (("renew", 8), ("expired", 8), ("expired", 9)),
    (("renew", 6), ("expired", 6), ("expired", 7)),
    (("renew", 5), ("renew", 9), ("expired", 9), ("expired", 12)),
    (("renew", 5), ("expired", 9), ("renew", 10), ("renew", 11), ("expired", 11)),
    (*(("renew", 3.0 * number) for number in range(1, 12)), ("expired", 36.75), ("expired", 37)),
)


def _live(impl: Any, terms: LeaseTerms, start: float, life: list[tuple[str, float]]) -> None:
    steps, lease = _begin(impl, terms, start)
    until = start + terms.duration
    for what, now in life:
        gone = now >= until
        if what == "renew":
            steps.do(f"lease.renew({now:g})", lease.renew, now)
            longer = now + terms.extension
            if gone:
                why = f"it had run out at {until:g}, and the blocks may be somebody else's: it stays so"
            elif longer < until:
                why = f"it lasts until {until:g} anyway: a renewal never shortens it to {longer:g}"
            else:
                why = f"a renewal is good for {terms.extension:g} s (`terms.extension`) from when it comes, {now:g}"
            until = until if gone else max(until, longer)
            _expect_until(steps, lease, until, why)
        else:
            got = steps.do(f"lease.expired({now:g})", lease.expired, now)
            steps.expect(got is not None, "nothing was returned; is a `return` missing?", gone)
            relation = "from then on it counts as expired" if gone else "not reached yet"
            steps.expect(bool(got) == gone, f"it lasts until {until:g}: {relation}", gone)
            _expect_until(steps, lease, until, "asking changes nothing")


def _begin(impl: Any, terms: LeaseTerms, start: float) -> tuple[Steps, Any]:
    name = getattr(impl, "__name__", "Lease")
    steps = Steps(f"a lease of {terms.duration:g} s; a renewal is good for {terms.extension:g} s")
    made: list[Any] = []
    steps.do(f"lease = {name}(terms, {start:g})", lambda: made.append(impl(terms, start)))
    lease = made[0]
    _expect_until(steps, lease, start + terms.duration, f"it begins at {start:g} and lasts `terms.duration`")
    return steps, lease


def _expect_until(steps: Steps, lease: Any, until: float, why: str) -> None:
    found = getattr(lease, "until", None)
    steps.expect(
        found is not None, "the worker reads `until`, to know when to look again", f"until = {until:g}"
    )
    right = isinstance(found, (int, float)) and math.isclose(found, until, rel_tol=1e-12)
    steps.expect(
        right, why, f"until = {until:g}", f"until = {found:g}" if right or _number(found) else repr(found)
    )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float))


def _two(impl: Any) -> None:
    """A worker holds many."""
    _, first = _begin(impl, LeaseTerms(6.0), 100.0)
    steps, second = _begin(impl, LeaseTerms(12.0), 103.0)
    steps.do("lease.renew(110)", second.renew, 110.0)
    _expect_until(steps, second, 118.0, "a renewal is good for 8 s from when it comes, 110")
    why = "another lease, made before and never renewed, lasts until 106: each has its own `until`"
    steps.expect(first.until == 106.0, why, "until = 106", f"until = {first.until:g}")


EXERCISES = (
    Exercise(
        name="cluster.missing_blocks",
        notebook="06",
        reference=missing_blocks,
        check=check_missing,
        hints=(
            "Three kinds of positions need not be asked for: those that the source doesn't offer yet, those that are "
            "here, and those that are on their way. What is left?",
            "Go through `range(offered)` and keep a position if it is in neither of the two sets. What is here need "
            "not be the beginning: pulls may end in any order, and the prefix cache may have had some blocks.",
            "`return [p for p in range(offered) if p not in arrived and p not in under_way]`",
        ),
        cluster_plug=lambda parts, impl: replace(
            parts, worker=with_piece(parts.worker, "missing", staticmethod(impl))
        ),
    ),
    Exercise(
        name="cluster.lease",
        notebook="06",
        reference=Lease,
        check=check_lease,
        hints=(
            "All that a lease has to remember is `until`. `expired` compares it with `now`; `renew` moves it. When "
            "must `renew` leave it alone?",
            "`expired`: True from `until` on, at `until` too. `renew`: nothing if it has expired; else `until` becomes "
            "`now + self.terms.extension`, unless it is later than that already.",
            "`return now >= self.until`; and `if not self.expired(now): self.until = max(self.until, now + "
            "self.terms.extension)`.",
        ),
        cluster_plug=lambda parts, impl: replace(parts, lease=impl),
    ),
)
