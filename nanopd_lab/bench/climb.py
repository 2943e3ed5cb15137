"""A search for the highest rate ends without one where the workload cannot tell rates apart any more.

An objective that no queue breaks (a time per token only, or a wait longer than the whole run) is met at every rate.
A search would climb on for ever, and its last rate would be no capacity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from nanopd_lab.bench.capacity import MOST, Capacity, find_capacity

SATURATED = 0.05  # of the rise of the rate: if completions rise by less, the workers had enough to do before


class Served(NamedTuple):
    """What became of `requests` sent at `rate` a second; `attainment` is the share of them in time."""

    rate: float
    requests: int
    completed_per_s: float
    attainment: float


class Rate(Protocol):
    """What is compared: requests sent and completed a second."""

    @property
    def rate(self) -> float: ...

    @property
    def completed_per_s(self) -> float: ...


class _Alike(Exception):  # noqa: N818 - no error
    """Rates from that of `args[0]`, a `Served`, on cannot be told apart; `args[1]` says why."""


def climb(
    serve: Callable[[float], Served],
    target: float,
    start: float = 1.0,
    tolerance: float = 0.05,
    min_duration_s: float = 0.0,
) -> Capacity:
    """As `find_capacity`, but ends where a higher rate, still in time, completes no more requests a second.

    Where the number of requests is given, all of them at once may still be too many, which is tried. Where they keep
    coming for `min_duration_s` a higher rate sends more of them: they only queue for longer.

    Returns:
        The capacity; with an infinite `above` its `reason` says why there is none, and what would show it.

    Raises:
        ValueError: as `find_capacity`.
    """
    met: Served | None = None
    missed = False

    def attainment(rate: float) -> float:
        nonlocal met, missed
        found = serve(rate)
        missed = missed or found.attainment < target
        if not missed:
            if met is not None and saturated(met, found):
                end(met, found)
            met = found
        return found.attainment

    def end(before: Served, found: Served) -> None:
        grows = found.requests >= math.ceil(found.rate * min_duration_s)
        if not min_duration_s or not grows:
            at_once = serve(MOST)
            if at_once.attainment >= target:
                raise _Alike(
                    at_once,
                    f"all {at_once.requests} requests at once are in time, so no rate of them is too high; send more "
                    "(--num-prompts, --min-duration, a longer trace) or promise a shorter time (--goodput)",
                )
        elif found.requests > before.requests:
            raise _Alike(
                found,
                f"{found.requests} requests in {min_duration_s:g} s are in time although only "
                f"{found.completed_per_s:.3g} a second are completed, no more than at {before.rate:.3g}: what is "
                "promised leaves room for a queue as long as the run; promise a shorter time to the first token or to "
                "the end (--goodput ttft:… e2el:…), or let requests keep coming for longer (--min-duration)",
            )

    try:
        return find_capacity(attainment, target, start, tolerance)
    except _Alike as alike:
        last, reason = alike.args
        return Capacity(target, last.rate, last.attainment, math.inf, reason)


def saturated(before: Rate, found: Rate) -> bool:
    """True if a higher rate completes no more requests a second than the one before it."""
    rise = found.rate / before.rate - 1
    return found.completed_per_s < before.completed_per_s * (1 + SATURATED * rise)
