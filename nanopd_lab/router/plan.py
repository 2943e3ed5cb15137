"""How many workers should prefill and how many decode.

    planner = Planner(outlook, Workload.of(prompt_lengths, output_lengths))
    planner.forecast(Layout(5, 3), rate)     # share of requests that get what they were promised
    planner.capacity(Layout(5, 3))           # at the highest rate at which 90 % still do
    planner.rank(layouts(8), rate)           # best first; search(1000) need not look at all of them

Formulas and what they leave out are described in `forecaster`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from nanopd_lab.router.forecaster import SHARE, Forecaster
from nanopd_lab.router.layouts import Forecast, Layout, Workload, layouts

__all__ = ["SHARE", "Forecast", "Layout", "Planner", "Workload", "layouts"]


class Planner(Forecaster):
    """Searches what a `Forecaster` says of one layout and one rate."""

    def capacity(self, layout: Layout) -> Forecast:
        """At the highest rate at which `share` of the requests still get what they were promised.

        A rate of 0 means that they don't at any rate; the rest then says what is missed by requests on their own.
        """
        layout.check()
        high = self.ceiling(layout)
        low = 1e-4 * high
        best = self.forecast(layout, low)
        if best.attainment < self.share:
            return best._replace(rate=0.0)
        low_met, high_met = best.attainment, 0.0
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

    def rank(self, candidates: Iterable[Layout], rate: float | None = None) -> list[Forecast]:
        """Best first: by the share that gets what it was promised at `rate`, or by capacity."""
        found = [self.capacity(each) if rate is None else self.forecast(each, rate) for each in candidates]
        return sorted(found, key=self._order(rate))

    def _order(self, rate: float | None) -> Callable[[Forecast], tuple[float, float]]:
        if rate is None:
            return lambda each: (-each.rate, -each.attainment)
        return lambda each: (-each.attainment, -self.ceiling(each.layout))

    def search(self, workers: int, rate: float | None = None, most: int = 64) -> list[Forecast]:
        """As `rank` over all layouts of so many workers; of more than `most`, only some, among them the best.

        Capacity rises with the prefill workers to one peak and then falls, so that it is enough to look closely between
        the neighbours of the best of a grid.
        """
        if workers <= most:
            return self.rank(layouts(workers), rate)
        step = math.ceil(math.sqrt(workers))
        grid = [*range(1, workers, step), workers - 1]
        found = {
            each.layout: each for each in self.rank([Layout(mixed=workers), *_splits(workers, grid)], rate)
        }
        peak = next(each.prefills for each in found if not each.mixed)
        near = range(max(1, peak - step), min(workers - 1, peak + step) + 1)
        found |= {each.layout: each for each in self.rank(_splits(workers, near), rate)}
        return sorted(found.values(), key=self._order(rate))


def _splits(workers: int, prefills: Iterable[int]) -> list[Layout]:
    return [Layout(each, workers - each) for each in dict.fromkeys(prefills)]
