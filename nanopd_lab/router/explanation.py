"""Why a route was chosen: what was estimated for each candidate, for people and for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from nanopd_lab.core import Route


class Candidate(NamedTuple):
    """What was estimated for one route.

    cost: the smallest is chosen
    terms: what it consists of or comes from, by name with the unit (`ttft_s`); the names are the policy's
    """

    route: Route
    cost: float
    terms: Mapping[str, float] = {}


class Explanation(NamedTuple):
    """One decision.

    decided_by: the term of the costs in which the choice differs most from the best other candidate; empty where
        nothing was estimated
    candidates: best first
    """

    route: Route
    reason: str
    decided_by: str = ""
    candidates: tuple[Candidate, ...] = ()

    @classmethod
    def of(cls, reason: str, candidates: Iterable[Candidate]) -> Explanation:
        """The candidate of the lowest cost, the first of equals, and what decided."""
        best, *others = sorted(candidates, key=lambda each: each.cost)
        decided = ""
        if others:
            gains = {name: others[0].terms[name] - value for name, value in best.terms.items()}
            decided = max(gains, key=lambda name: gains[name], default="")
        return cls(best.route, reason, decided, (best, *others))

    def __str__(self) -> str:
        lines = [f"{self.route}: {self.reason}"]
        if self.decided_by:
            lines.append(f"decided by {self.decided_by}")
        for each in self.candidates:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in each.terms.items())
            lines.append(f"  {each.route!s:<12} cost {each.cost:.4g}: {terms}")
        return "\n".join(lines)


Explainer = Callable[[], Explanation]
