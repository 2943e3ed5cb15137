"""What the transports between GPUs share: pools in GPU memory, shown through CUDA IPC.

A source publishes a block only when its GPU has finished writing it (an event that it has seen pass), and raises its
generation on the host before it launches what writes it again. The reader's copies wait for what its current stream
holds when the pull is started, so that no earlier kernel writes to a target block after them.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from typing import Any

import torch

from nanopd_lab.transfer.base import Pool, PoolAddress, TransferError
from nanopd_lab.transfer.device_memory import device_of, export_memory, open_memory
from nanopd_lab.transfer.pulls import Peer, PoolTransport
from nanopd_lab.transfer.segments import SharedGenerations, map_integers


class CudaPoolTransport(PoolTransport):
    """Memory of a GPU that other processes can open; generations in shared host memory.

    A source must keep its pool until its readers have disconnected: CUDA leaves undefined what happens to a mapping
    whose memory is freed. If it dies, the driver keeps the memory for those who have mapped it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tables = SharedGenerations()
        self._shown: list[torch.Tensor] = []

    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `Transport`.

        Raises:
            TransferError: not a GPU's memory.
        """
        self._check_cuda(torch.device(device))
        return torch.empty(tuple(size), dtype=dtype, device=device)

    def generations(self, num_blocks: int) -> MutableSequence[int]:
        """See `Transport`."""
        return self._tables.make(num_blocks)

    def _show(self, pool: Pool) -> dict[str, Any]:
        self._check_cuda(pool.memory.device)
        generations = self._tables.details(pool.generations)
        self._shown.append(pool.memory)  # whoever else forgets it: others may have mapped it
        return {"memory": export_memory(pool.memory), "generations": generations}

    def _open(self, address: PoolAddress) -> Peer:
        through = self._through(device_of(address.details["memory"]["gpu"]), address.worker)
        generations = map_integers(address.details["generations"])
        shape = (address.num_blocks, address.block_bytes)
        memory, release = open_memory(address.details["memory"], shape, through)
        return Peer(address.worker, Pool(memory, generations), release)

    def _through(self, source: torch.device, worker: str) -> torch.device:
        """The device whose streams will read the source; TransferError if that cannot be."""
        raise NotImplementedError

    def _let_go(self) -> None:
        """For `_stop`, after the last copy: nobody can open the pool any more."""
        self._tables.close()
        self._shown.clear()

    def _check_cuda(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise TransferError(
                f"{self.name!r} moves blocks between GPUs, not {device} memory; use 'shm' for CPUs"
            )


def bytes_of(memory: torch.Tensor) -> torch.Tensor:
    """A pool's memory as uint8 `[num_blocks, block_bytes]`, a view."""
    return memory.view(memory.shape[0], -1).view(torch.uint8)
