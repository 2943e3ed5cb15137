"""How much longer outputs live now than those that have ended, by comparing hazards.

The first to end are the short ones, and where lengths grow all that have ended are too short. So who has come lately is
held against what ends say: an output that has come as far as `a` tokens would have ended H(a) times by now, if lengths
were as those of the ends (Nelson, 1969; Aalen, 1978), and in truth it has, or it has not. The ratio of the two sums is
by how much the hazard has changed (a standardised mortality ratio), and a mean length changes with its reciprocal.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence

DOUBT = 6.0  # ends more, expected and seen: few say little
MOST = 2.0  # how often an output can be overdue: how far it has come is a guess
CHANGE = 4.0  # of the mean, at most by this factor: how it goes on beyond what has been seen is not known
SURE = 24  # ends from which on the outcome counts more than what was believed before


def hazard_ratio(ends: Sequence[int], ended: Sequence[int], ages: Sequence[float]) -> float:
    """Ends of who has come lately, by those that were to be expected.

    Args:
        ends: lengths of outputs that have ended, tokens, at least one
        ended: lengths of those that have come lately and have ended
        ages: tokens that those have produced that have come lately and go on
    """
    counts = Counter(ends)
    ordered, hazards, left = sorted(counts), [0.0], len(ends)
    for tokens in ordered:
        hazards.append(min(hazards[-1] + counts[tokens] / left, MOST))
        left -= counts[tokens]
    expected, seen = 0.0, 0
    for tokens in ended:
        place = bisect_right(ordered, tokens)
        expected += hazards[place]
        seen += hazards[max(0, place - 1)] < MOST  # who comes further is not looked at beyond
    for age in ages:
        expected += hazards[bisect_right(ordered, age)]
    return (seen + DOUBT) / (expected + DOUBT)


def corrected(believed: float, ends: Sequence[int], ended: Sequence[int], ages: Sequence[float]) -> float:
    """`believed`, a mean length, as far as `hazard_ratio` knows it better; arguments as there."""
    if not ends:
        return believed
    ratio = hazard_ratio(ends, ended, ages)
    found = sum(ends) / len(ends) / min(CHANGE, max(1 / CHANGE, ratio))
    return believed + len(ends) / (len(ends) + SURE) * (found - believed)
