"""`shm`: CPU pools in memory that processes share."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import MutableSequence, Sequence
from math import prod
from typing import Any

import torch

from nanopd_lab.cpu import block_copy
from nanopd_lab.transfer.base import Pool, PoolAddress, TransferError
from nanopd_lab.transfer.pulls import Job, Peer, PoolTransport
from nanopd_lab.transfer.segments import Segment, SharedGenerations, map_integers, map_tensor

PIECE_BYTES = 32 << 20  # copied between two looks at whether to go on: some 3 ms


class ShmTransport(PoolTransport):
    """One background thread copies, in pieces, without Python's lock; `poll` collects what it has finished.

    A pool is in pages that are taken from the system when they are first written, so the first pull into a block is
    much slower than later ones. A source that dies leaves its memory readable to those who are connected: a pull from
    it still gives the right bytes.
    """

    name = "shm"

    def __init__(self) -> None:
        super().__init__()
        self._tables = SharedGenerations()
        self._segments: list[tuple[torch.Tensor, Segment]] = []
        self._todo: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[Job, float, str | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `Transport`. Zeroed in effect, as fresh pages are.

        Raises:
            TransferError: not CPU memory.
        """
        if torch.device(device).type != "cpu":
            raise TransferError(f"'shm' shares CPU memory, not {device}; use 'p2p' or 'pinned' between GPUs")
        segment = Segment(max(1, prod(size)) * dtype.itemsize)
        memory = map_tensor(segment.details).view(dtype)[: prod(size)].view(tuple(size))
        self._segments.append((memory, segment))
        return memory

    def generations(self, num_blocks: int) -> MutableSequence[int]:
        """See `Transport`."""
        return self._tables.make(num_blocks)

    def _show(self, pool: Pool) -> dict[str, Any]:
        block_copy.prepare()
        for memory, segment in self._segments:
            if memory.data_ptr() == pool.memory.data_ptr():
                return {"memory": segment.details, "generations": self._tables.details(pool.generations)}
        raise TransferError(
            "other processes cannot read this pool; make it with the transport's own `allocate`"
        )

    def _open(self, address: PoolAddress) -> Peer:
        memory = map_tensor(address.details["memory"])[: address.num_blocks * address.block_bytes]
        generations = map_integers(address.details["generations"])
        # Nothing to release: a mapping ends with its tensor.
        return Peer(address.worker, Pool(memory.view(address.num_blocks, -1), generations))

    def _enqueue(self, job: Job) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._copy, name="nanopd-shm", daemon=True)
            self._thread.start()
        self._todo.put(job)

    def _advance(self) -> None:
        while not self._done.empty():
            job, finished, error = self._done.get()
            self._end(job, error, finished)

    def _copy(self) -> None:
        """The background thread. It reads pulls and writes blocks, and touches nothing else of the transport."""
        while self._copy_one(self._todo.get()):
            pass  # no name for the job here: it would keep a forgotten source's memory until the next pull

    def _copy_one(self, job: Job | None) -> bool:
        if job is None:
            return False
        error = None
        try:
            self._copy_blocks(job)
        except Exception as problem:  # whatever it is, the pull must be reported
            error = f"{type(problem).__name__}: {problem}"
        self._done.put((job, time.monotonic(), error))
        return True

    def _copy_blocks(self, job: Job) -> None:
        target, source, size = self._registered().memory, job.peer.pool.memory, job.peer.pool.block_bytes
        step = max(1, PIECE_BYTES // size)
        for first in range(0, len(job.pull.source_blocks), step):
            if self._late(job):
                return
            part = slice(first, first + step)
            block_copy.copy_blocks(
                source.data_ptr(), job.pull.source_blocks[part], target.data_ptr(), job.pull.target_blocks[part],
                size,
            )  # fmt: skip

    def _stop(self) -> None:
        if self._thread is not None:
            self._todo.put(None)
            self._thread.join()  # at most until the piece in hand is copied: every job has been told to stop
        for _, segment in self._segments:
            segment.close()
        self._segments.clear()
        self._tables.close()
