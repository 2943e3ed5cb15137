"""`p2p`: the reader's GPU reads the source's memory, on the same GPU or one it has peer access to.

All blocks of a pull move in one launch of a kernel that reads peer memory (`cuda/move_blocks.cu`). Between two H100s,
for 128 scattered blocks of 2.4 MB: 352 GB/s of the 389 of one large copy, whatever the kernel's shape (threads, loads
in flight, bulk copies through shared memory). The copy engines, asked for each block, reach 164–285 GB/s (300 by
cuMemcpyBatchAsync) and keep the host busy for 0.25–0.9 ms.
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
        self._target: torch.Tensor | None = None  # the own pool's bytes
        # An event for each pull, and the ids that its launch reads.
        self._flying: dict[Job, tuple[torch.cuda.Event, torch.Tensor]] = {}

    def _show(self, pool: Pool) -> dict[str, Any]:
        if pool.block_bytes % 16:
            raise TransferError(
                f"'p2p' moves blocks in pieces of 16 bytes; {pool.block_bytes} is no multiple of 16"
            )
        details = super()._show(pool)
        self._target = bytes_of(pool.memory)
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

    def _launch(self, job: Job) -> tuple[torch.cuda.Event, torch.Tensor]:
        target, stream, pull = self._target, self._stream, job.pull
        assert target is not None
        assert stream is not None
        # What a pull costs beside its bytes counts: 300 MB take 0.8 ms. So the kernel reads the ids where they are.
        ids = torch.empty(2, len(pull.target_blocks), dtype=torch.int64, pin_memory=True)
        ids.numpy()[:] = (pull.target_blocks, pull.source_blocks)
        stream.wait_stream(torch.cuda.current_stream(target.device))
        ops.enqueue_pull(target, job.peer.pool.memory, ids, stream)
        event = torch.cuda.Event()
        event.record(stream)
        return event, ids

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
