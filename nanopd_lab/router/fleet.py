"""The workers that a policy may choose from, kept so that choosing one does not mean looking at all.

For a policy it is a sequence of `WorkerView`, in a fixed order, and may be scanned like a list. `least` answers the
question that most policies ask in time that grows with the logarithm of the number of workers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

from nanopd_lab.router.policy import WorkerView

Key = Callable[[WorkerView], Any]


class Fleet(Sequence[WorkerView]):
    """See the module. Who keeps it calls `put` when a worker changes, comes or goes.

    Args:
        names: of all workers that there can be; their order is the fleet's
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._slots: list[WorkerView | None] = [None] * len(self._places)
        self.num_members = self._pushes = 0
        self._heaps: dict[
            Key, list[tuple[Any, int, int, WorkerView]]
        ] = {}  # those that have changed are left in
        self._members: list[WorkerView] | None = None
        self._sources: list[str] | None = None
        self._targets: list[str] | None = None

    def put(self, name: str, view: WorkerView | None) -> None:
        """The worker is now like this, or (None) not to be chosen."""
        place = self._places[name]
        old = self._slots[place]
        if view is old:
            return
        self._slots[place] = view
        members = self._members
        if members is not None and view is not None and len(members) == len(self._slots):
            members[place] = view  # of many, few change between two choices
        else:
            self._members = None
        if old is None or view is None or old.role is not view.role:
            self.num_members += (view is not None) - (old is not None)
            self._sources = self._targets = None
        if view is not None:
            for key, heap in self._heaps.items():
                if (value := key(view)) is not None:
                    self._pushes += 1  # views have no order of their own
                    heapq.heappush(heap, (value, place, self._pushes, view))

    @property
    def names(self) -> Sequence[str]:
        """Of all workers that there can be."""
        return list(self._places)

    def of(self, name: str) -> WorkerView | None:
        """The worker of this name, if it can be chosen."""
        return self._slots[self._places[name]] if name in self._places else None

    def least(self, key: Key, other_than: str | None = None) -> WorkerView | None:
        """The first of those with the smallest key; the key of one that is not wanted is None.

        Args:
            key: a function that is the same object each time, of the view alone
            other_than: not this one
        """
        heap = self._heaps.get(key)
        if heap is None or len(heap) > 16 * len(self._slots) + 64:
            keyed = [(place, view, key(view)) for place, view in enumerate(self._slots) if view is not None]
            heap = [(value, place, 0, view) for place, view, value in keyed if value is not None]
            heapq.heapify(heap)
            self._heaps[key] = heap
        aside = None
        found = None
        while heap:
            _, place, _, view = heap[0]
            if self._slots[place] is not view:
                heapq.heappop(heap)
            elif view.name == other_than:
                entry = heapq.heappop(heap)
                aside = aside or entry
            else:
                found = view
                break
        if aside is not None:
            heapq.heappush(heap, aside)
        return found

    # ------------------------------------------------------------------ as a sequence

    @property
    def sources(self) -> list[str]:
        """Names of those whose role allows prefill."""
        if self._sources is None:
            self._sources = [view.name for view in self if view.role.prefills]
        return self._sources

    @property
    def targets(self) -> list[str]:
        """Names of those whose role allows decode."""
        if self._targets is None:
            self._targets = [view.name for view in self if view.role.decodes]
        return self._targets

    def _list(self) -> list[WorkerView]:
        if self._members is None:
            self._members = [view for view in self._slots if view is not None]
        return self._members

    def __len__(self) -> int:
        return len(self._list())

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self._list())

    @overload
    def __getitem__(self, index: int) -> WorkerView: ...
    @overload
    def __getitem__(self, index: slice) -> list[WorkerView]: ...
    def __getitem__(self, index: int | slice) -> WorkerView | list[WorkerView]:
        return self._list()[index]


def num_targets(workers: Sequence[WorkerView]) -> int:
    """How many may decode."""
    if isinstance(workers, Fleet):
        return len(workers.targets)
    return sum(worker.role.decodes for worker in workers)


def least(workers: Sequence[WorkerView], key: Key, other_than: str | None = None) -> WorkerView | None:
    """`Fleet.least`, for any sequence of workers."""
    if isinstance(workers, Fleet):
        return workers.least(key, other_than)
    wanted = [(key(worker), worker) for worker in workers if worker.name != other_than]
    return min(
        (pair for pair in wanted if pair[0] is not None), key=lambda pair: pair[0], default=(None, None)
    )[1]
