"""Which blocks of a table are here: mostly the first so many, as they come in that order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

_NONE: frozenset[int] = frozenset()


class Positions:
    """A set of positions in a block table; it only grows.

    first: so many from the beginning on are in it
    others: what is in it behind them, with a gap between
    """

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.others = _NONE

    def add(self, positions: Sequence[int]) -> None:
        """Put these in too. A range has steps of 1."""
        if isinstance(positions, range) and positions.start <= self.first:
            self.first = max(self.first, positions.stop)
        else:
            self.others = self.others.union(positions)
        if self.others:
            while self.first in self.others:
                self.first += 1
            self.others = frozenset(position for position in self.others if position > self.first)

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and (0 <= position < self.first or position in self.others)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain(range(self.first), self.others)

    def __len__(self) -> int:
        return self.first + len(self.others)


def compact(positions: Sequence[int]) -> range | tuple[int, ...]:
    """Ascending positions as a range, where they follow each other."""
    if isinstance(positions, range):
        return positions
    first, behind = positions[0], positions[-1] + 1
    return range(first, behind) if len(positions) == behind - first else tuple(positions)
