"""Do two ways of measuring put policies in the same order? Ranks with ties wherever the seeds don't tell two apart.

Policies get the same requests, so that two of them are compared seed by seed: one is above the other if the interval of
their differences (`bench.sweep.interval`) does not hold 0, otherwise they are tied. With three seeds that is: if all
three say so. Ties are not transitive; a rank is 1, plus the policies above, plus half of those tied (Kendall, 1945).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanopd_lab.bench.sweep import interval

Values = Mapping[str, Sequence[float]]
"""By policy: one figure, of each seed."""


class Agreement(NamedTuple):
    """Of two rankings of the same policies.

    kendall: τ-b; spearman: ρ of the ranks; nan if one side tells no two apart
    told_apart: pairs that both sides tell apart; contradictions: those of them in which they put the other one first
    ranks: by policy, (on the first side, on the second), 1 for the smallest figure
    """

    kendall: float
    spearman: float
    told_apart: int
    contradictions: list[tuple[str, str]]
    ranks: dict[str, tuple[float, float]]

    def as_json(self) -> dict[str, Any]:
        """JSON has no nan."""
        found = self._asdict()
        for name in ("kendall", "spearman"):
            found[name] = None if math.isnan(found[name]) else found[name]
        return found


def above(a: Sequence[float], b: Sequence[float]) -> int:
    """1 if `a` is larger than `b`, seed by seed, -1 if it is smaller, 0 if that is not certain.

    Raises:
        ValueError: they are not of the same number of seeds.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    found = interval(differences)
    if found.low is None or found.high is None:
        return int(np.sign(found.mean))
    return 1 if found.low > 0 else -1 if found.high < 0 else 0


def agreement(first: Values, second: Values) -> Agreement:
    """Compare two rankings.

    Raises:
        ValueError: they are of different policies, of fewer than two, or of different numbers of seeds.
    """
    if set(first) != set(second) or len(first) < 2:
        raise ValueError(
            f"rankings of {', '.join(first) or 'nothing'} and of {', '.join(second) or 'nothing'}; both must be of the "
            "same two policies or more"
        )
    names = list(first)
    orders = np.zeros((2, len(names), len(names)))
    for side, values in enumerate((first, second)):
        for i, j in itertools.permutations(range(len(names)), 2):
            orders[side, i, j] = above(values[names[i]], values[names[j]])
    ranks = 1 + (orders > 0).sum(axis=2) + ((orders == 0).sum(axis=2) - 1) / 2
    contradictions = [
        (names[i], names[j])
        for i, j in itertools.combinations(range(len(names)), 2)
        if orders[0, i, j] * orders[1, i, j] < 0
    ]
    both = int((orders[0] * orders[1] != 0).sum()) // 2
    return Agreement(
        _cosine(orders[0].ravel(), orders[1].ravel()),
        _cosine(ranks[0] - ranks[0].mean(), ranks[1] - ranks[1].mean()),
        both,
        contradictions,
        {name: (float(ranks[0, i]), float(ranks[1, i])) for i, name in enumerate(names)},
    )


def _cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """τ-b of signs and ρ of centred ranks alike (Daniels, 1944)."""
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else math.nan
