"""What workers on one host share: each step is faster while other workers rest (see `cost.company`).

A step is so much work, in the seconds that it takes while all are busy. It gets done faster or slower as others begin
and end; when it ends is reckoned anew each time.

    worker 0   |=======step=======|=======step=======|
    worker 1          |==step==|  .                      work of worker 0's first step: fast, slow, fast
"""

from __future__ import annotations

from typing import Protocol

from nanopd_lab.cost.company import Company


class Progress:
    """How work gets done: at a speed that changes now and then.

    Args:
        began: when it begins, s
        decodes_only: what kind of work it is
        speed: work (s) a second
    """

    def __init__(self, began: float, decodes_only: bool, speed: float) -> None:
        self.began = began
        self.decodes_only = decodes_only
        self._pieces = [(began, 0.0, speed)]  # from when on, work done by then, speed

    @property
    def speed(self) -> float:
        """Now."""
        return self._pieces[-1][2]

    def go_on(self, now: float, speed: float) -> None:
        """At another speed from now on."""
        time, work, before = self._pieces[-1]
        self._pieces.append((now, work + (now - time) * before, speed))

    def when(self, work: float) -> float:
        """So much of it is done, s; as far as it is known by now."""
        for time, done, speed in reversed(self._pieces):
            if done <= work:
                return time + (work - done) / speed
        return self.began


class Worker(Protocol):
    """What a host knows of its workers."""

    def keep_pace(self) -> None:
        """The speed has changed; see `Host.speed`."""
        ...


class Host:
    """Who is in a step. Workers tell at the end of each turn of their loop: between two steps nobody rests."""

    def __init__(self, company: Company) -> None:
        self.company = company
        self._busy: dict[Worker, None] = {}  # in an order that is the same in every run

    def begin(self, worker: Worker, now: float, decodes_only: bool) -> Progress:
        """A step or a run of them begins."""
        others = len(self._busy) - (worker in self._busy)
        return Progress(now, decodes_only, self.company.speed(decodes_only, others))

    def speed(self, decodes_only: bool) -> float:
        """Of a worker that is busy."""
        return self.company.speed(decodes_only, len(self._busy) - 1)

    def turned(self, worker: Worker, busy: bool) -> None:
        """A worker is in a step now, or in none; the others go on accordingly."""
        if busy == (worker in self._busy):
            return
        others = [each for each in self._busy if each is not worker]
        if busy:
            self._busy[worker] = None
        else:
            del self._busy[worker]
        for other in others:
            other.keep_pace()
