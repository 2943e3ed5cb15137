"""What transports over a network do alike: nothing is shared, so what is one-sided elsewhere takes two.

The source answers with threads of its own (`pull_service`), beside its computation. For every source that it knows a
reader has a thread too, a connection and what carries the bytes beside it (`pull_link`); if any of these fails, the
pull fails, and the next one makes them anew.

A pull that is stopped asks for no more and ends when what it had asked for has come, or at its deadline: then what
carries the bytes is dropped, and nothing is written any more.
"""

from __future__ import annotations

import queue
import weakref
from abc import abstractmethod
from collections.abc import Callable, MutableSequence, Sequence
from contextlib import suppress
from typing import Any

import torch

from nanopd_lab.cpu import block_copy
from nanopd_lab.transfer.base import Pool, PoolAddress, TransferError
from nanopd_lab.transfer.device_memory import uuid_of
from nanopd_lab.transfer.pull_link import Channel, Link
from nanopd_lab.transfer.pull_service import LOOPBACK, Answers, PullService
from nanopd_lab.transfer.pulls import Job, Peer, PoolTransport
from nanopd_lab.transfer.segments import SharedGenerations, map_integers

_JOIN_S = 2.0


class PairTransport(PoolTransport):
    """Every pair of workers for itself. A transport adds what the source answers (`_answers`), the reader's channel
    (`_channel_maker`), and which pools it cannot join (`_check`).

    Other processes of the same machine read the generation table themselves; to other machines the source says what
    they are when the bytes have arrived.

    Args:
        host: address of this machine that the readers reach it at, and that it listens on. Whoever reaches it can
            read the pool if it knows the token in the pool's address.
        shared_tables: False treats all readers as those on other machines
    """

    def __init__(self, host: str = LOOPBACK, shared_tables: bool = True) -> None:
        super().__init__()
        self._host, self._shared_tables = host, shared_tables
        self._tables = SharedGenerations()
        self._services: list[PullService] = []
        self._links: dict[Peer, Link] = {}
        # Also when it is forgotten, or the process ends: C++ threads must not outlive what they belong to.
        self._finalizer = weakref.finalize(self, _close_all, self._services, self._links)
        self._done: queue.SimpleQueue[tuple[Job, str | None, float]] = queue.SimpleQueue()

    # ---- what a transport adds ---------------------------------------------------------------------------

    @abstractmethod
    def _answers(self, pool: Pool, host: str) -> Answers:
        """For readers of the own pool. OSError: not an address of this machine."""

    @abstractmethod
    def _channel_maker(self) -> Callable[[dict[str, Any], Pool, float], Channel]:
        """From the details of a source's address, the own pool, and the seconds it may take. Must not hold on to this
        transport: it may be forgotten first."""

    def _check(self, address: PoolAddress, own: Pool) -> None:
        """TransferError if their memory cannot be joined."""

    # ---- the contract ------------------------------------------------------------------------------------

    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `Transport`."""
        return torch.empty(tuple(size), dtype=dtype, device=device)

    def generations(self, num_blocks: int) -> MutableSequence[int]:
        """See `Transport`."""
        return self._tables.make(num_blocks)

    def _show(self, pool: Pool) -> dict[str, Any]:
        block_copy.prepare()
        details: dict[str, Any] = {"device": pool.memory.device.type}
        if pool.memory.is_cuda:
            details["gpu"] = uuid_of(pool.memory.device)
        if self._shared_tables:
            details["generations"] = self._tables.details(pool.generations)
        try:
            self._services.append(PullService(self._host, self._answers(pool, self._host), self.name))
        except OSError as error:
            raise TransferError(
                f"cannot listen on {self._host!r}: {error}; give an address of this machine, as in "
                f"'{self.name}:{LOOPBACK}'"
            ) from error
        return details | self._services[-1].details

    def _open(self, address: PoolAddress) -> Peer:
        own = self._registered()
        if address.details["device"] != own.memory.device.type:
            raise TransferError(
                f"{address.worker}'s pool is on {address.details['device']}, that of {self._worker} on "
                f"{own.memory.device.type}; {self.name!r} joins CPUs or GPUs"
            )
        self._check(address, own)
        table: MutableSequence[int] | None = None
        with suppress(TransferError, KeyError):
            table = map_integers(address.details["generations"])
        heard = None if table is not None else [0] * address.num_blocks
        details, make = address.details, self._channel_maker()
        try:
            link = Link(address, lambda seconds: make(details, own, seconds), heard, self._done, self.name)
        except (OSError, ValueError) as error:
            raise TransferError(
                f"{address.worker} does not answer at {details['host']}, port {details['port']}: "
                f"{error}. It has closed its pool or is dead; connect again when it has been restarted"
            ) from error
        # Nothing of its memory is here: only its size.
        memory = torch.empty(address.num_blocks, address.block_bytes, dtype=torch.uint8, device="meta")
        peer = Peer(address.worker, Pool(memory, table if table is not None else heard or []))

        links = self._links

        def release() -> None:  # without the transport: it may be forgotten before its peers
            if (link := links.pop(peer, None)) is not None:
                link.close()

        peer.release = release
        self._links[peer] = link
        return peer

    def _enqueue(self, job: Job) -> None:
        after = None
        if (own := self._registered().memory).is_cuda:
            after = torch.cuda.current_stream(own.device).record_event()
        self._links[job.peer].put(job, after)

    def _advance(self) -> None:
        while not self._done.empty():
            job, error, finished = self._done.get()
            if self._jobs.get(job.pull.pull_id) is job:  # else it has been reported already
                self._end(job, job.stop or error, finished)
        for job in list(self._jobs.values()):
            if self._late(job) and self._links[job.peer].withdraw(job):
                self._end(job)

    def disconnect(self, worker: str) -> None:
        """See `Transport`."""
        peer = self._peers.get(worker)
        link = self._links.get(peer) if peer else None
        super().disconnect(worker)
        if link is not None:
            link.close()  # its pulls fail in any case

    def _stop(self) -> None:
        self._finalizer()
        self._tables.close()


def _close_all(services: list[PullService], links: dict[Peer, Link]) -> None:
    for link in links.values():
        link.close()
    for service in services:
        service.close()
    for link in links.values():
        link.thread.join(_JOIN_S)
    links.clear()
    services.clear()
