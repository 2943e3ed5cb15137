"""Virtual time: a queue of events in one total order, so that a simulation is the same every time it runs.

At equal times the kind decides, then a rank (of a worker), then who was scheduled first:

    FAULT < ARRIVAL < MESSAGE < PULL < WAKE < LOOP

What comes in at the instant at which a step ends is thus there when the worker looks, as in a real loop. `key` is the
place in that order up to which everything has happened; `passed` tells whether a moment lies behind it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from typing import Any, Final

_NEVER: Final = math.inf


class Kind(enum.IntEnum):
    """Of an event, in the order in which events of the same time happen."""

    FAULT = 0
    ARRIVAL = 1
    MESSAGE = 2
    PULL = 3
    WAKE = 4
    LOOP = 5  # a worker's loop comes round: its step has ended, or something woke it


Happen = Callable[[int], None]
"""What an event does. It is told its order, by which whoever has called it off meanwhile knows it."""

Event = tuple[float, int, int, int, Happen]
"""Time in seconds, kind, rank, order of being scheduled, and what happens."""


class EventQueue:
    """Events to come. `now` is the time of the one that was taken last."""

    def __init__(self) -> None:
        self.now = 0.0
        self.key: tuple[Any, ...] = (-math.inf,)
        self._heap: list[Event] = []
        self._order = 0

    def push(self, time: float, kind: Kind, happen: Happen, rank: int = 0) -> int:
        """Schedule an event; returns its order, which is above 0.

        Raises:
            ValueError: the time is not a number, infinite or in the past.
        """
        if not self.now <= time < _NEVER:
            raise ValueError(f"an event at {time} s; it must be finite and not before now ({self.now} s)")
        self._order = order = self._order + 1
        heappush(self._heap, (time, kind, rank, order, happen))
        return order

    def run(self) -> Iterator[float]:
        """Have the events happen until there are none left; stops behind each, with its time. Moves `now` and `key`."""
        heap, key = self._heap, self.key
        while heap:
            event = heappop(heap)
            self.now, _, _, order, happen = event
            # What is scheduled for this very instant can come behind its place; the order of others has gone further.
            if event > key:
                key = self.key = event
            happen(order)
            yield self.now

    @property
    def processed(self) -> int:
        """Events that were taken."""
        return self._order - len(self._heap)

    def passed(self, kind: Kind, rank: int) -> bool:
        """True if an event of this instant with this key would have been taken already."""
        return (self.now, kind, rank, _NEVER) < self.key

    def __len__(self) -> int:
        return len(self._heap)
