"""`p2p`: the reader's GPU reads the source's memory, on the same GPU or one it has peer access to.

All blocks of a pull move in one launch of a kernel that reads peer memory (`cuda/move_blocks.cu`). Between two H100s,
for 128 scattered blocks of 2.4 MB, the kernel reads 370 GB/s where one large copy moves 395, whatever its shape
(threads, loads in flight, bulk copies through shared memory); pushed by the source's GPU 344. The copy engines, asked
for each block, reach 164–285 GB/s (300 by cuMemcpyBatchAsync) and keep the host busy for 0.25–0.9 ms; given a part of
the blocks beside the kernel they gain nothing. What is left is the host: it takes 75 us to get a lone pull going and
20 to report it, 45 and 13 right behind another pull.
"""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import torch

from nanopd_lab.kernels.moves import Puller
from nanopd_lab.transfer.base import Pool, Pull, TransferError
from nanopd_lab.transfer.cuda_pools import CudaPoolTransport, bytes_of
from nanopd_lab.transfer.device_memory import can_reach, enable_peer_access
from nanopd_lab.transfer.pulls import Job


class Ticket:
    """What a launch needs of the host until it has ended, then another: the ids that it reads, the event behind it.

    Both take microseconds to make, and a pull of 300 MB little more than 800.
    """

    def __init__(self, most_blocks: int = 512) -> None:
        self.most_blocks = most_blocks
        self.ids = torch.empty(2 * most_blocks, dtype=torch.int64, pin_memory=True)
        self.event = torch.cuda.Event()
        self._bytes = memoryview(self.ids.numpy())  # type: ignore[arg-type]

    def write(self, pull: Pull) -> None:
        """The ids as `Puller.enqueue` wants them."""
        struct.pack_into(
            f"{2 * len(pull.target_blocks)}q", self._bytes, 0, *pull.target_blocks, *pull.source_blocks
        )


class P2PTransport(CudaPoolTransport):
    """One launch a pull, on a stream of its own; `poll` asks the event behind each.

    A kernel that runs cannot be taken back: a cancelled or late pull is reported when it has ended.
    """

    name = "p2p"

    def __init__(self) -> None:
        super().__init__()
        self._stream: torch.cuda.Stream | None = None
        self._puller: Puller | None = None  # into the own pool
        self._computed: torch.cuda.Event | None = None  # recorded anew for each pull
        self._flying: dict[Job, Ticket] = {}
        self._tickets: list[Ticket] = []  # those that no launch needs any more

    def _show(self, pool: Pool) -> dict[str, Any]:
        if pool.block_bytes % 16:
            raise TransferError(
                f"'p2p' moves blocks in pieces of 16 bytes; {pool.block_bytes} is no multiple of 16"
            )
        details = super()._show(pool)
        # Before the computation's kernels: its thread blocks are short and mostly wait for memory.
        self._stream = torch.cuda.Stream(pool.memory.device, priority=-1)
        self._puller = Puller(bytes_of(pool.memory), self._stream)
        self._computed = torch.cuda.Event()
        self._tickets = [Ticket()]  # others' events belong to another device
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

    def _launch(self, job: Job) -> Ticket:
        stream, puller, computed, pull = self._stream, self._puller, self._computed, job.pull
        assert stream is not None
        assert puller is not None
        assert computed is not None
        count = len(pull.target_blocks)
        ticket = self._ticket(count)
        ticket.write(pull)
        # Target blocks may still be written by kernels that were launched for their last owner.
        computing = torch.cuda.current_stream(stream.device)
        if not computing.query():
            computed.record(computing)
            stream.wait_event(computed)
        puller.enqueue(job.peer.pool.memory, ticket.ids, count)
        ticket.event.record(stream)
        return ticket

    def _ticket(self, blocks: int) -> Ticket:
        while self._tickets:
            ticket = self._tickets.pop()
            if blocks <= ticket.most_blocks:
                return ticket
        return Ticket(2 * blocks)

    def _advance(self) -> None:
        for job, ticket in list(self._flying.items()):
            self._late(job)
            error = None
            try:
                if not ticket.event.query():
                    continue
                self._tickets.append(ticket)
            except RuntimeError as problem:  # the device is lost
                error = f"the copy failed: {problem}"
            del self._flying[job]
            self._end(job, error)

    def _stop(self) -> None:
        if self._flying and self._stream is not None:
            with contextlib.suppress(RuntimeError):  # the device is lost: it writes no more either
                self._stream.synchronize()
        self._flying.clear()
        self._tickets.clear()
        self._let_go()
