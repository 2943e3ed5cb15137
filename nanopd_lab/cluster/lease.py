"""Leases: blocks are kept for somebody who may never come back, but not for ever.

The source of a hand-over holds its blocks under a lease. The target renews it while it still wants them; if it dies, or
the link does, the lease runs out and the blocks are free again. The proportions are those of vLLM's NIXL connector: a
renewal every sixth of the duration, each good for two thirds of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LeaseTerms:
    """Seconds. `patience`: how long the target waits for room in its own pool while nobody there gives any back, or for
    the source to publish again what it re-used."""

    duration: float = 30.0
    patience: float = 30.0

    def __post_init__(self) -> None:
        if not all(isinstance(each, (int, float)) for each in (self.duration, self.patience)):
            raise ValueError(
                f"a lease of {self.duration!r} with {self.patience!r} of patience; both must be numbers of seconds"
            )
        if not (self.duration > 0 and self.patience > 0):
            raise ValueError(
                f"a lease of {self.duration} s with {self.patience} s of patience; both must be positive"
            )

    @property
    def renewal(self) -> float:
        """Between two renewals."""
        return self.duration / 6

    @cached_property
    def shortest(self) -> float:
        """What is waited for from now on is not due before so long."""
        return min(self.renewal, self.patience)

    @property
    def extension(self) -> float:
        """What a renewal is good for, from when it comes."""
        return self.duration * 2 / 3


class Lease:
    """Of the blocks of one hand-over.

    Args:
        terms: how long
        now: when it begins
    """

    def __init__(self, terms: LeaseTerms, now: float) -> None:
        self.terms = terms
        self.until = now + terms.duration

    def renew(self, now: float) -> None:
        """Keep it for `terms.extension` from now; never shorten it, never bring back one that has run out."""
        if not self.expired(now):
            self.until = max(self.until, now + self.terms.extension)

    def expired(self, now: float) -> bool:
        """True from `until` on."""
        return now >= self.until
