"""`inproc`: workers of one process. Deterministic, for tests, the simulation of faults and notebooks."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, MutableSequence, Sequence
from typing import Any

import torch

from nanopd_lab.cpu import block_copy
from nanopd_lab.kernels import ops
from nanopd_lab.transfer.base import Pool, PoolAddress, Pull, TransferError
from nanopd_lab.transfer.packing import pack_blocks, unpack_blocks
from nanopd_lab.transfer.pulls import Job, Peer, PoolTransport


def _nothing_wrong(_: Pull) -> str | None:
    return None


def _nothing_held(_: Pull) -> bool:
    return False


class InprocTransport(PoolTransport):
    """Copies inside `poll`, never before, so that a test decides what happens between `start` and the copy.

    Memory may be anything torch indexes. On GPUs the copy is ordered on torch's current streams: a worker's later
    kernels see it, and so a source must compute on its device's current stream.

    Args:
        pools: who shows which pool; the same mapping for all workers. A worker that is closed, or taken out of it (a
            simulated death), fails the pulls from it.
        clock: seconds; a simulation gives its own
        fault: called when a pull's copy is due: the reason why it fails, or None. It may also act, for example raise
            a generation of the source.
        hold: called in every `poll` for every pull: True leaves it for a later one
        pack, unpack: to get blocks out of one pool and into another through these, see `transfer.packing`; without
            both they are copied directly where that is possible
    """

    name = "inproc"

    def __init__(
        self,
        pools: MutableMapping[str, Pool],
        clock: Callable[[], float] = time.monotonic,
        fault: Callable[[Pull], str | None] = _nothing_wrong,
        hold: Callable[[Pull], bool] = _nothing_held,
        pack: Callable[[torch.Tensor, Sequence[int]], torch.Tensor] | None = None,
        unpack: Callable[[torch.Tensor, Sequence[int], torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__(clock)
        self._pools, self._fault, self._hold = pools, fault, hold
        self._pack, self._unpack = pack, unpack

    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `Transport`."""
        return torch.empty(tuple(size), dtype=dtype, device=device)

    def generations(self, num_blocks: int) -> MutableSequence[int]:
        """See `Transport`."""
        return [0] * num_blocks

    def _show(self, pool: Pool) -> dict[str, Any]:
        return {}

    def register(self, worker: str, pool: Pool) -> PoolAddress:
        """See `Transport`."""
        address = super().register(worker, pool)
        if pool.memory.device.type == "cpu":
            block_copy.prepare()
        self._pools[worker] = pool
        return address

    def _open(self, address: PoolAddress) -> Peer:
        pool = self._pools.get(address.worker)
        if pool is None:
            raise TransferError(
                f"no worker {address.worker!r} shows its pool in this process, only {sorted(self._pools)}; give all "
                "of its workers the same `pools`, or use 'shm' between processes"
            )
        return Peer(address.worker, pool)

    def _enqueue(self, job: Job) -> None:
        pass

    def _advance(self) -> None:
        for job in list(self._jobs.values()):
            if not self._late(job) and self._hold(job.pull):
                continue
            error = job.stop
            if error is None and self._pools.get(job.peer.worker) is not job.peer.pool:
                error = f"{job.peer.worker} is gone"
            error = error or self._fault(job.pull)
            if error is None:
                self._copy(self._registered().memory, job.pull, job.peer.pool.memory)
            self._end(job, error)

    def _copy(self, target: torch.Tensor, pull: Pull, source: torch.Tensor) -> None:
        if self._pack is None and self._unpack is None:
            copy_blocks(target, pull.target_blocks, source, pull.source_blocks)
            return
        packed = (self._pack or pack_blocks)(source, pull.source_blocks).to(target.device)
        (self._unpack or unpack_blocks)(target, pull.target_blocks, packed.view(-1, *target.shape[1:]))

    def _stop(self) -> None:
        if self._pools.get(self._worker) is self._own:
            self._pools.pop(self._worker, None)


def copy_blocks(
    target: torch.Tensor, target_blocks: Sequence[int], source: torch.Tensor, source_blocks: Sequence[int]
) -> None:
    """`target[target_blocks[i]] = source[source_blocks[i]]`, whatever memory each is in. Shapes `[num_blocks, ...]`,
    contiguous; blocks of the same size."""
    size = target[0].numel() * target.itemsize
    if source.device == target.device and source.data_ptr() != target.data_ptr():
        # Directly: what is gathered first costs a second copy, and on a CPU fresh pages, which are slower by ten.
        if target.device.type == "cpu":
            block_copy.copy_blocks(source.data_ptr(), source_blocks, target.data_ptr(), target_blocks, size)
            return
        if target.is_cuda and size % 16 == 0 and source.dtype == target.dtype:
            ids = torch.tensor([list(target_blocks), list(source_blocks)], device=target.device)
            ops.pull_blocks(target, ids[0], source, ids[1], validate_values=False)
            return
    packed = pack_blocks(source, source_blocks).to(target.device)
    unpack_blocks(target, target_blocks, packed.view(-1, *target.shape[1:]))
