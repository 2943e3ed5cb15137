"""`pinned`: a relay through pinned host memory, for GPUs that cannot read each other.

The reader drives both halves: on a stream of the *source's* device it copies blocks to a slot of its ring of pinned
buffers, on a stream of its own device from there into its pool. Both copy engines work at once:

    source GPU to host   | 0 | 1 | 2 | 3 | 4 | 5 |            the slot of stage i is free again
    host to own GPU          | 0 | 1 | 2 | 3 | 4 | 5 |        when its second half has been copied

Streams wait for each other through events on the devices; the host only enqueues.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanopd_lab.transfer.base import Pool
from nanopd_lab.transfer.cuda_pools import CudaPoolTransport
from nanopd_lab.transfer.device_memory import copy_async
from nanopd_lab.transfer.pulls import Job

# What may be enqueued ahead, in copies each way. The driver makes the host wait at about a thousand; a chunk of 2,048
# tokens is 128 blocks of 16. More is fed by later polls, so a pull of any size needs neither a thread (which would
# fight with the engine for Python's lock at every copy) nor a wait.
MAX_AHEAD = 256
# A pull of n stages takes the time of n + 1, so even a short one is cut into about this many.
STAGES = 8


@dataclass(eq=False)
class Relay:
    """A pull that is being enqueued. `last` is the event behind what has been."""

    job: Job
    stage_blocks: int
    next: int = 0
    last: torch.cuda.Event | None = None

    @property
    def complete(self) -> bool:
        """All is enqueued that will be."""
        return self.job.stop is not None or self.next == len(self.job.pull.source_blocks)


class PinnedTransport(CudaPoolTransport):
    """Relay through a ring of pinned buffers.

    Works whatever the GPUs can or cannot do, also when both workers share one. The process must see the source's GPU
    and gets a context on it, some hundreds of MB of that GPU's memory.

    Args:
        slots: buffers in the ring; two would do if every copy took the same time
        slot_bytes: of each, at least a block. Large enough that the copies' fixed costs don't show (under 4 MiB
            they do), small enough that a pull is many stages.
    """

    name = "pinned"

    def __init__(self, slots: int = 8, slot_bytes: int = 8 << 20) -> None:
        super().__init__()
        if slots < 2 or slot_bytes < 1:
            raise ValueError(f"slots={slots}, slot_bytes={slot_bytes}: at least two slots of at least a byte")
        self._slots, self._slot_bytes = slots, slot_bytes
        self._ring: torch.Tensor | None = None
        self._free: list[torch.cuda.Event | None] = [None] * slots
        self._next_slot = 0
        self._inward: torch.cuda.Stream | None = None
        self._outward: dict[torch.device, torch.cuda.Stream] = {}
        self._relays: list[Relay] = []
        self._ahead: deque[tuple[torch.cuda.Event, int]] = deque()
        self._copies_ahead = 0

    def _show(self, pool: Pool) -> dict[str, Any]:
        details = super()._show(pool)
        self._slot_bytes = max(self._slot_bytes, pool.block_bytes)
        with torch.cuda.device(pool.memory.device):
            self._ring = self._pinned(self._slots * self._slot_bytes)
            self._inward = torch.cuda.Stream(pool.memory.device)
        return details

    @staticmethod
    def _pinned(num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def _through(self, source: torch.device, worker: str) -> torch.device:
        if source not in self._outward:
            self._outward[source] = torch.cuda.Stream(source)
        return source

    def _enqueue(self, job: Job) -> None:
        blocks = len(job.pull.source_blocks)
        fitting = min(self._slot_bytes // job.peer.pool.block_bytes, MAX_AHEAD // 4)
        self._relays.append(Relay(job, max(1, min(fitting, -(-blocks // STAGES)))))
        assert self._inward is not None
        # Target blocks may still be written by kernels that were launched for their last owner.
        self._inward.wait_stream(torch.cuda.current_stream(self._inward.device))
        self._feed()

    def _feed(self) -> None:
        for relay in self._relays:
            while not relay.complete and self._copies_ahead < MAX_AHEAD:
                try:
                    self._enqueue_stage(relay)
                except RuntimeError as error:
                    relay.job.stop = f"the copy could not be enqueued: {error}"
                    self._synchronize()

    def _enqueue_stage(self, relay: Relay) -> None:
        own, source, size = (
            self._registered().memory,
            relay.job.peer.pool.memory,
            relay.job.peer.pool.block_bytes,
        )
        assert self._ring is not None
        assert self._inward is not None
        outward, inward, slot = self._outward[source.device], self._inward, self._next_slot
        buffer = self._ring.data_ptr() + slot * self._slot_bytes
        part = slice(relay.next, relay.next + relay.stage_blocks)
        filled, copied = torch.cuda.Event(), torch.cuda.Event()

        with torch.cuda.device(source.device):
            if (free := self._free[slot]) is not None:
                outward.wait_event(free)
            for place, block, count in runs(relay.job.pull.source_blocks[part]):
                copy_async(buffer + place * size, source.data_ptr() + block * size, count * size, outward)
            filled.record(outward)
        with torch.cuda.device(own.device):
            inward.wait_event(filled)
            for place, block, count in runs(relay.job.pull.target_blocks[part]):
                copy_async(own.data_ptr() + block * size, buffer + place * size, count * size, inward)
            copied.record(inward)

        blocks = len(relay.job.pull.source_blocks[part])
        self._free[slot] = relay.last = copied
        self._next_slot = (slot + 1) % self._slots
        relay.next += blocks
        self._ahead.append((copied, blocks))
        self._copies_ahead += blocks

    def _advance(self) -> None:
        for relay in self._relays:
            self._late(relay.job)
        error = None
        try:
            while self._ahead and self._ahead[0][0].query():
                self._copies_ahead -= self._ahead.popleft()[1]
            self._feed()
            ended = [r for r in self._relays if r.complete and (r.last is None or r.last.query())]
        except RuntimeError as problem:  # the device is lost
            error, ended = f"the copy failed: {problem}", list(self._relays)
        for relay in ended:
            self._relays.remove(relay)
            self._end(relay.job, error)

    def _synchronize(self) -> None:
        for stream in (*self._outward.values(), self._inward):
            if stream is not None:
                with contextlib.suppress(RuntimeError):  # the device is lost: it writes no more either
                    stream.synchronize()

    def _stop(self) -> None:
        if self._relays:
            self._synchronize()
        self._relays.clear()
        self._ahead.clear()
        self._ring = None
        self._let_go()


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Adjacent blocks as one copy: (position of the first in `blocks`, its number, how many)."""
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield first, blocks[first], i - first
            first = i
