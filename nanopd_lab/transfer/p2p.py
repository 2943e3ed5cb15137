"""`p2p`: the reader's GPU reads the source's memory, on the same GPU or one it has peer access to.

All blocks of a pull move in one launch of a kernel that reads peer memory (`cuda/move_blocks.cu`). Copying them one by
one costs more in launches than in bytes: 123 GB/s of 391 between two H100s, measured for blocks of 2.4 MB.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from nanopd_lab.kernels import gpu, ops
from nanopd_lab.kernels.launches import move_launch
from nanopd_lab.transfer.base import Pool, TransferError
from nanopd_lab.transfer.cuda_pools import CudaPoolTransport, bytes_of
from nanopd_lab.transfer.device_memory import can_reach, enable_peer_access
from nanopd_lab.transfer.pulls import Job


class P2PTransport(CudaPoolTransport):
    """One launch a pull, on a stream of its own; `poll` asks the event behind each.

    A kernel that runs cannot be taken back: a cancelled or late pull is reported when it has ended.
    """

    name = "p2p"

    def __init__(self) -> None:
        super().__init__()
        self._stream: torch.cuda.Stream | None = None
        # An event for each pull, and the tensors that its launch reads.
        self._flying: dict[Job, tuple[torch.cuda.Event, Any]] = {}

    def _show(self, pool: Pool) -> dict[str, Any]:
        if pool.block_bytes % 16:
            raise TransferError(
                f"'p2p' moves blocks in pieces of 16 bytes; {pool.block_bytes} is no multiple of 16"
            )
        details = super()._show(pool)
        # Before the computation's kernels: its thread blocks are short and mostly wait for memory.
        self._stream = torch.cuda.Stream(pool.memory.device, priority=-1)
        with torch.cuda.device(pool.memory.device):  # compiled now, not while the first pull's deadline runs
            gpu.load(move_launch(1, pool.block_bytes), pool.memory.device.index)
        return details

    def _through(self, source: torch.device, worker: str) -> torch.device:
        target = self._registered().memory.device
        if not can_reach(target, source):
            raise TransferError(
                f"{target} has no peer access to {source}, where {worker} keeps its pool; use 'pinned', which relays "
                "through host memory"
            )
        enable_peer_access(target, source)
        return target

    def _enqueue(self, job: Job) -> None:
        try:
            self._flying[job] = self._launch(job)
        except (RuntimeError, ValueError) as error:
            self._end(job, f"the copy could not be launched: {error}")

    def _launch(self, job: Job) -> tuple[torch.cuda.Event, Any]:
        own, stream = self._registered().memory, self._stream
        assert stream is not None
        ids = torch.tensor([list(job.pull.target_blocks), list(job.pull.source_blocks)]).pin_memory()
        computing = torch.cuda.current_stream(own.device)
        with torch.cuda.stream(stream):
            stream.wait_stream(computing)
            to_ids, from_ids = there = ids.to(own.device, non_blocking=True)
            ops.pull_blocks(bytes_of(own), to_ids, job.peer.pool.memory, from_ids, validate_values=False)
            event = torch.cuda.Event()
            event.record(stream)
        return event, (ids, there)

    def _advance(self) -> None:
        for job, (event, _) in list(self._flying.items()):
            self._late(job)
            error = None
            try:
                if not event.query():
                    continue
            except RuntimeError as problem:  # the device is lost
                error = f"the copy failed: {problem}"
            del self._flying[job]
            self._end(job, error)

    def _stop(self) -> None:
        if self._flying and self._stream is not None:
            with contextlib.suppress(RuntimeError):  # the device is lost: it writes no more either
                self._stream.synchronize()
        self._flying.clear()
        self._let_go()
