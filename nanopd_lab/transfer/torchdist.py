"""`torchdist`: torch.distributed carries the blocks, gloo between CPUs and NCCL between GPUs, on one host or several.

Nothing is shared but a network, so what is one-sided elsewhere takes two: the source answers with threads of its own
(`pull_service`), which pack blocks beside its computation. For every source that it knows a reader has a thread too, a
connection and a process group; if any of these fails, the pull fails, and the next one makes them anew.

A pull that is stopped asks for no more and ends when what it had asked for has come, or at its deadline: then the group
is dropped, and nothing is written any more.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, MutableSequence, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from nanopd_lab.cpu import block_copy
from nanopd_lab.transfer.base import Pool, PoolAddress, TransferError
from nanopd_lab.transfer.device_memory import uuid_of
from nanopd_lab.transfer.process_groups import CONNECT_S, LOOPBACK, PairGroup, reached_store
from nanopd_lab.transfer.pull_service import WINDOW, PullService, line_of
from nanopd_lab.transfer.pulls import Job, Peer, PoolTransport
from nanopd_lab.transfer.segments import SharedGenerations, map_integers
from nanopd_lab.transfer.staging import Staging

_JOIN_S = 2.0


class Channel:
    """The reader's end of a connection to a source, and of the process group beside it.

    Raises:
        OSError: nobody answers, or somebody else.
    """

    def __init__(self, details: dict[str, Any], device: torch.device) -> None:
        self._host, self._device = details["host"], device
        self._socket = socket.create_connection((self._host, details["port"]), timeout=CONNECT_S)
        self._group: PairGroup | None = None
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lines = self._socket.makefile("rb")
            self._socket.sendall(line_of({"token": details["token"]}))
            self._met = self._line()
        except BaseException:
            self.close()
            raise

    def join(self) -> PairGroup:
        """Make the process group, once."""
        if self._group is None:
            store = dist.PrefixStore(str(self._met["pair"]), reached_store(self._host, self._met["store"]))
            self._group = PairGroup(store, 1, self._socket.getsockname()[0], self._device)
        return self._group

    def pull(
        self,
        blocks: Sequence[int],
        targets: Sequence[int],
        staging: Staging,
        after: torch.cuda.Event | None,
        stopped: Callable[[], bool],
        seconds: Callable[[], float],
    ) -> None:
        """Ask for blocks chunk by chunk, and write them to those of the own pool; fewer if it is `stopped`.

        Args:
            after: what may still write to the target blocks
            seconds: left

        Raises:
            OSError, RuntimeError: the source is gone or too slow; the channel is of no use any more.
        """
        group, step = self.join(), staging.blocks_each
        parts = [slice(first, first + step) for first in range(0, len(blocks), step)]
        flying: list[list[dist.Work]] = []
        for number, part in enumerate(parts):
            while len(flying) < min(number + WINDOW, len(parts)) and not stopped():
                asked = parts[len(flying)]
                # Asked for first: NCCL's first receive waits until the other side sends.
                self._socket.sendall(line_of({"blocks": list(blocks[asked]), "seconds": seconds()}))
                places = staging.incoming(len(flying), targets[asked])
                flying.append([group.receive(each) for each in places])
            if number == len(flying):
                return
            for work in flying[number]:
                group.wait(work, seconds())
            flying[number] = []
            staging.take_in(number, targets[part], after)

    def generations(self, blocks: Sequence[int], seconds: float) -> list[int]:
        """What they are there by now.

        Raises:
            OSError: as `pull`.
        """
        self._socket.settimeout(max(seconds, 1e-3))
        self._socket.sendall(line_of({"check": list(blocks)}))
        return self._line()["generations"]

    def _line(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the source has closed the connection")
        return json.loads(line)

    def close(self) -> None:
        """End what is under way, with an error. From any thread; safe to call twice."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._group is not None:
            self._group.abort()
        self._socket.close()


class Link:
    """A source as its reader sees it: a thread that pulls from it, and makes a new channel where one has failed."""

    def __init__(
        self,
        address: PoolAddress,
        own: Pool,
        heard: MutableSequence[int] | None,
        done: queue.SimpleQueue[Any],
    ) -> None:
        self._address, self._own, self._heard, self._done = address, own, heard, done
        self._channel: Channel | None = Channel(address.details, own.memory.device)
        self._todo: queue.SimpleQueue[tuple[Job, Any] | None] = queue.SimpleQueue()
        self._closed = False
        self._starting = threading.Lock()
        self._current: Job | None = None
        self.thread = threading.Thread(
            target=self._run, name=f"nanopd-torchdist-{address.worker}", daemon=True
        )
        self.thread.start()

    def put(self, job: Job, after: Any) -> None:
        """Pull; `after`: a CUDA event behind what may still write to the target blocks, or None."""
        self._todo.put((job, after))

    def withdraw(self, job: Job) -> bool:
        """True if a stopped job has not begun, and so never will."""
        with self._starting:
            return self._current is not job

    def close(self) -> None:
        """Stop soon; nobody is waited for."""
        self._closed = True
        self._todo.put(None)
        if (channel := self._channel) is not None:
            channel.close()

    def _run(self) -> None:
        staging = Staging(self._own, WINDOW)
        with suppress(OSError, RuntimeError, ValueError):  # the first pull will say what is wrong
            self._joined()
        while (item := self._todo.get()) is not None:
            self._done.put((item[0], self._fetch(staging, *item), time.monotonic()))
            del item  # an idle thread keeps no job
        if self._channel is not None:
            self._channel.close()

    def _joined(self) -> Channel:
        if self._channel is None:
            self._channel = Channel(self._address.details, self._own.memory.device)
            if self._closed:
                self._channel.close()
        self._channel.join()
        return self._channel

    def _fetch(self, staging: Staging, job: Job, after: Any) -> str | None:
        """Why it failed, None if it did not."""

        def seconds() -> float:
            return job.deadline - time.monotonic()

        def stopped() -> bool:
            return job.stop is not None or self._closed or seconds() < 0

        with self._starting:
            if stopped():
                return None  # whoever stopped it has said why, or the clock will
            self._current = job
        pull = job.pull
        try:
            channel = self._joined()
            channel.pull(pull.source_blocks, pull.target_blocks, staging, after, stopped, seconds)
            if self._heard is not None and not stopped():
                found = channel.generations(pull.source_blocks, seconds())
                for block, generation in zip(pull.source_blocks, found, strict=True):
                    self._heard[block] = generation
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            failed, self._channel = self._channel, None
            if failed is not None:
                failed.close()
            return f"{self._address.worker} did not send: {type(error).__name__}: {error}"
        finally:
            self._current = None
        return None


class TorchDistTransport(PoolTransport):
    """Pulls through torch.distributed.

    Other processes of the same machine read the generation table themselves; to other machines the source says what
    they are when the bytes have arrived.

    Args:
        host: address of this machine that the readers reach it at, and that it listens on. Whoever reaches it can
            read the pool if it knows the token in the pool's address.
        shared_tables: False treats all readers as those on other machines
    """

    name = "torchdist"

    def __init__(self, host: str = LOOPBACK, shared_tables: bool = True) -> None:
        super().__init__()
        self._host, self._shared_tables = host, shared_tables
        self._tables = SharedGenerations()
        self._services: list[PullService] = []
        self._links: dict[Peer, Link] = {}
        # Also when it is forgotten, or the process ends: torch's threads must not outlive their groups.
        self._finalizer = weakref.finalize(self, _close_all, self._services, self._links)
        self._done: queue.SimpleQueue[tuple[Job, str | None, float]] = queue.SimpleQueue()

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
            self._services.append(PullService(pool, self._host))
        except OSError as error:
            raise TransferError(
                f"cannot listen on {self._host!r}: {error}; give an address of this machine, as in "
                f"'torchdist:{LOOPBACK}'"
            ) from error
        return details | self._services[-1].details

    def _open(self, address: PoolAddress) -> Peer:
        own = self._registered()
        if address.details["device"] != own.memory.device.type:
            raise TransferError(
                f"{address.worker}'s pool is on {address.details['device']}, that of {self._worker} on "
                f"{own.memory.device.type}; 'torchdist' joins CPUs or GPUs"
            )
        if own.memory.is_cuda and address.details["gpu"] == uuid_of(own.memory.device):
            raise TransferError(
                f"{address.worker} and {self._worker} share a GPU, and NCCL joins two; use 'p2p', which copies "
                "inside one"
            )
        table: MutableSequence[int] | None = None
        with suppress(TransferError, KeyError):
            table = map_integers(address.details["generations"])
        heard = None if table is not None else [0] * address.num_blocks
        try:
            link = Link(address, own, heard, self._done)
        except (OSError, ValueError) as error:
            raise TransferError(
                f"{address.worker} does not answer at {address.details['host']}, port {address.details['port']}: "
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
