"""What the Bayesian predictor says of one request."""

from __future__ import annotations

import math

import numpy as np

from nanopd_lab.router.lengths import check_remaining
from nanopd_lab.router.predictor.conjugate import StudentT
from nanopd_lab.router.predictor.shape import EDGES, between
from nanopd_lab.router.predictor.student_t import stdtrit

LONGEST = 40.0  # log lengths from here on are over any max_tokens

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_TAILS = ((_NODES + 1) / 2) ** 3  # shares above at which a mean looks, close together where lengths are long
_SHARES = 3 * ((_NODES + 1) / 2) ** 2 * _WEIGHTS / 2


class BayesianForecast:
    """A snapshot: Student's t of log length, and the shape that puts it right. See `LengthForecast`."""

    __slots__ = ("max_tokens", "t", "table")

    def __init__(self, t: StudentT, table: list[float], max_tokens: int) -> None:
        self.t, self.table, self.max_tokens = t, table, max_tokens

    @property
    def mean(self) -> float:
        return self.remaining_mean(0)

    def quantile(self, p: float) -> float:
        return self.remaining_quantile(0, p)

    def above(self, tokens: int) -> float:
        """The probability of more than so many tokens, were there no `max_tokens`."""
        if tokens < 1:
            return 1.0
        return between(self.t.above(math.log(tokens + 0.5)), EDGES, self.table)

    def remaining_quantile(self, produced: int, p: float) -> float:
        check_remaining(produced, p)
        left = self.max_tokens - produced
        if left < 1 or p == 1:
            return float(max(left, 0))
        share = between((1 - p) * self.above(produced), self.table, EDGES)
        log_length = self.t.mean - self.t.scale * float(stdtrit(self.t.df, share))
        if log_length > LONGEST:
            return float(left)
        return float(min(left, max(1, math.ceil(math.exp(log_length) - 0.5) - produced)))

    def remaining_mean(self, produced: int) -> float:
        check_remaining(produced)
        left = self.max_tokens - produced
        if left < 1:
            return 0.0
        shares = np.interp(_TAILS * self.above(produced), self.table, EDGES)
        logs = self.t.mean - self.t.scale * stdtrit(self.t.df, shares)
        lengths = np.exp(np.minimum(logs, LONGEST)) - produced
        return min(max(float(_SHARES @ np.minimum(lengths, left)), 1.0), float(left))
