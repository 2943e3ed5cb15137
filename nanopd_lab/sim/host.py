"""What workers on one host share: a step's speed depends on what the others do meanwhile (see `cost.company`).

A step is so much work, in the seconds that it takes while all are in steps of its kind. It gets done faster or slower
as others begin and end; when it ends is reckoned anew each time.

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
        # What kind of step each one is in: of decodes only or not; in an order that is the same in every run.
        self._busy: dict[Worker, bool] = {}

    def begin(self, worker: Worker, now: float, decodes_only: bool) -> Progress:
        """A step or a run of them begins."""
        return Progress(now, decodes_only, self.speed(worker, decodes_only))

    def speed(self, worker: Worker, decodes_only: bool) -> float:
        """Of a worker in a step of that kind, beside those that are in one now."""
        others = [kind for each, kind in self._busy.items() if each is not worker]
        decodes = sum(others)
        return self.company.speed(decodes_only, decodes, len(others) - decodes)

    def turned(self, worker: Worker, decodes_only: bool | None) -> None:
        """A worker is in a step of that kind now, or in none; the others go on accordingly."""
        if self._busy.get(worker) == decodes_only:
            return
        others = [each for each in self._busy if each is not worker]
        if decodes_only is None:
            del self._busy[worker]
        else:
            self._busy[worker] = decodes_only
        for other in others:
            other.keep_pace()
