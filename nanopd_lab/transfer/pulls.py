"""What all transports of this package do alike: know the pools, refuse senseless pulls, judge those that ended.

A transport adds how memory is shown (`_show`, `_open`) and how bytes move (`_enqueue`, `_advance`).

Why comparing generations *after* the copy is enough. The source raises a block's generation, later writes new content.
Had the copy read any of that content, then the raise came before it, and this process would see it too, given that
(a) the source's raise becomes visible before its writes and (b) this process loads the generation after the copied
bytes. On x86 stores are seen in their order and loads are made in theirs. On Arm neither holds by itself. For
(a) the source gives up and takes back some lock between raising and writing, at least Python's own around the
operations that compute; for (b) a copy in a thread is handed over through a queue (its lock), and one on a GPU
through an event. A release of a lock followed by an acquire orders what is before against what is after, on Arm too.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanopd_lab.transfer.base import Pool, PoolAddress, Pull, PullResult, PullStatus, TransferError


@dataclass(eq=False)
class Peer:
    """A pool that this process has opened. `release` is called when it is forgotten and no pull uses it any more."""

    worker: str
    pool: Pool
    release: Callable[[], None] | None = None
    pulls: int = 0
    gone: bool = False


@dataclass(eq=False)
class Job:
    """A pull under way. `stop` says why it should go no further; a transport looks at it between pieces."""

    pull: Pull
    peer: Peer
    deadline: float
    started: float
    stop: str | None = None


class PoolTransport(ABC):
    """The part of `Transport` that does not depend on how bytes move.

    Args:
        clock: seconds; the deadlines' and results' clock
    """

    name = ""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._worker = ""
        self._own: Pool | None = None
        self._peers: dict[str, Peer] = {}
        self._jobs: dict[int, Job] = {}
        self._ended: list[PullResult] = []
        self._closed = False

    # ---- what a transport adds ---------------------------------------------------------------------------

    @abstractmethod
    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `Transport`."""

    @abstractmethod
    def generations(self, num_blocks: int) -> MutableSequence[int]:
        """See `Transport`."""

    @abstractmethod
    def _show(self, pool: Pool) -> dict[str, Any]:
        """Details for the address of the own pool; TransferError if it cannot be shown."""

    @abstractmethod
    def _open(self, address: PoolAddress) -> Peer:
        """Reach another worker's pool, or TransferError."""

    @abstractmethod
    def _enqueue(self, job: Job) -> None:
        """Take on a pull. Must not fail: what goes wrong is reported through `_end`."""

    @abstractmethod
    def _advance(self) -> None:
        """Call `_end` for every pull whose target blocks are written no more. Never waits."""

    @abstractmethod
    def _stop(self) -> None:
        """Wait until no target block is written any more, and let go of what is shared. Called once."""

    # ---- the contract ------------------------------------------------------------------------------------

    def register(self, worker: str, pool: Pool) -> PoolAddress:
        """See `Transport`."""
        self._check_open()
        if not pool.memory.is_contiguous() or len(pool.generations) != pool.memory.shape[0]:
            raise TransferError(
                f"{worker}: the pool's memory must be contiguous, with one generation a block; got "
                f"{list(pool.memory.shape)} with strides {pool.memory.stride()} and {len(pool.generations)} "
                "generations"
            )
        details = self._show(pool)
        self._worker, self._own = worker, pool
        return PoolAddress(worker, self.name, pool.memory.shape[0], pool.block_bytes, details)

    def connect(self, address: PoolAddress) -> None:
        """See `Transport`."""
        self._check_open()
        own = self._registered()
        if address.transport != self.name:
            raise TransferError(
                f"{address.worker}'s pool is shown by transport {address.transport!r}, this one is {self.name!r}; "
                "give all workers the same"
            )
        if address.block_bytes != own.block_bytes:
            raise TransferError(
                f"{address.worker}'s blocks have {address.block_bytes} bytes, those of {self._worker} "
                f"{own.block_bytes}; both need the same model, block size and data type"
            )
        peer = self._open(address)
        self.disconnect(address.worker)
        self._peers[address.worker] = peer

    def disconnect(self, worker: str) -> None:
        """See `Transport`."""
        peer = self._peers.pop(worker, None)
        if peer is None:
            return
        peer.gone = True
        for job in self._jobs.values():
            if job.peer is peer:
                job.stop = job.stop or f"{worker} is gone"
        self._release_unused(peer)

    def start(self, pull: Pull, deadline: float) -> None:
        """See `Transport`."""
        self._check_open()
        own = self._registered()
        peer = self._peers.get(pull.source)
        if peer is None:
            raise TransferError(
                f"pull {pull.pull_id}: {self._worker} is not connected to {pull.source!r}, only to "
                f"{sorted(self._peers)}; connect to its address first"
            )
        if pull.pull_id in self._jobs:
            raise TransferError(f"pull {pull.pull_id} is under way already; give every pull its own id")
        for worker, blocks, pool in (
            (pull.source, pull.source_blocks, peer.pool),
            (self._worker, pull.target_blocks, own),
        ):
            low, high, count = min(blocks), max(blocks), pool.num_blocks
            if low < 0 or high >= count:
                raise TransferError(
                    f"pull {pull.pull_id} asks for blocks {low} to {high} of {worker}, which has 0 to {count - 1}"
                )
        if len(set(pull.target_blocks)) < len(pull.target_blocks):
            raise TransferError(
                f"pull {pull.pull_id} writes a target block twice: {list(pull.target_blocks)}"
            )
        job = Job(pull, peer, deadline, self._clock())
        self._jobs[pull.pull_id] = job
        peer.pulls += 1
        self._enqueue(job)

    def poll(self) -> list[PullResult]:
        """See `Transport`."""
        if not self._closed:
            self._advance()
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, pull_id: int) -> None:
        """See `Transport`."""
        if job := self._jobs.get(pull_id):
            job.stop = job.stop or "cancelled"

    def close(self) -> None:
        """See `Transport`. A last `poll` reports the pulls that this has cut short."""
        if self._closed:
            return
        self._closed = True
        for job in self._jobs.values():
            job.stop = job.stop or "the transport was closed"
        self._stop()
        for job in list(self._jobs.values()):
            self._end(job)
        for worker in list(self._peers):
            self.disconnect(worker)
        self._own = None

    # ---- for transports ----------------------------------------------------------------------------------

    def _end(self, job: Job, error: str | None = None, finished: float | None = None) -> None:
        """Judge a pull whose target blocks are safe. `error`: why the bytes did not arrive, if they did not."""
        finished = self._clock() if finished is None else finished
        error = error or job.stop
        if error is None and finished > job.deadline:
            error = f"finished {finished - job.deadline:.3f} s after its deadline"
        status = PullStatus.FAILED if error else PullStatus.DONE
        if error is None:
            generations = job.peer.pool.generations
            for block, published in zip(job.pull.source_blocks, job.pull.generations, strict=True):
                if generations[block] != published:
                    status = PullStatus.STALE
                    error = (
                        f"block {block} of {job.peer.worker} is of generation {generations[block]}, "
                        f"not {published}: used again"
                    )
                    break
        size = len(job.pull.target_blocks) * job.peer.pool.block_bytes if status is PullStatus.DONE else 0
        del self._jobs[job.pull.pull_id]
        job.peer.pulls -= 1
        self._release_unused(job.peer)
        self._ended.append(PullResult(job.pull.pull_id, status, job.started, finished, size, error))

    def _late(self, job: Job) -> bool:
        """Mark a job to stop when its deadline has passed. True if it is to stop, for whatever reason."""
        if job.stop is None and self._clock() > job.deadline:
            job.stop = "late: its deadline passed before the copy had ended"
        return job.stop is not None

    def _registered(self) -> Pool:
        if self._own is None:
            raise TransferError("this transport has no pool to pull into; register its own pool first")
        return self._own

    def _check_open(self) -> None:
        if self._closed:
            raise TransferError("this transport has been closed; make another")

    @staticmethod
    def _release_unused(peer: Peer) -> None:
        if peer.gone and not peer.pulls and peer.release is not None:
            peer.release()
            peer.release = None
