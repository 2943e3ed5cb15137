"""Buffers that packed blocks travel in: a ring of them on each side of a link."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanopd_lab.cpu import block_copy
from nanopd_lab.transfer.base import Pool


class Staging:
    """A ring of buffers in the memory that the pool is in. What it copies has been copied when it returns.

    Args:
        pool: packed from, or unpacked into
        slots: buffers
        buffer_bytes: of each; at least a block
    """

    def __init__(self, pool: Pool, slots: int, buffer_bytes: int) -> None:
        self.blocks_each = max(1, buffer_bytes // pool.block_bytes)
        self._pool = pool
        self._rows = pool.memory.view(pool.num_blocks, -1).view(torch.uint8)
        device = pool.memory.device
        size = self.blocks_each * pool.block_bytes
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def buffer(self, number: int, blocks: int) -> torch.Tensor:
        """Of the number-th chunk: uint8 `[blocks * block_bytes]`."""
        return self._buffers[number % len(self._buffers)][: blocks * self._pool.block_bytes]

    def pack(self, blocks: Sequence[int], buffer: torch.Tensor) -> None:
        """Blocks of the pool, in this order."""
        if self._stream is None:
            size, places = self._pool.block_bytes, range(len(blocks))
            block_copy.copy_blocks(self._rows.data_ptr(), blocks, buffer.data_ptr(), places, size)
            return
        with torch.cuda.stream(self._stream):
            rows, ids = self._wide(self._rows), self._ids(blocks)
            torch.index_select(rows, 0, ids, out=self._wide(buffer.view(len(blocks), -1)))
        self._stream.synchronize()

    def unpack(
        self, buffer: torch.Tensor, blocks: Sequence[int], after: torch.cuda.Event | None = None
    ) -> None:
        """Into blocks of the pool. after: what may still write to them"""
        if self._stream is None:
            size, places = self._pool.block_bytes, range(len(blocks))
            block_copy.copy_blocks(buffer.data_ptr(), places, self._rows.data_ptr(), blocks, size)
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            self._wide(self._rows).index_copy_(0, self._ids(blocks), self._wide(buffer.view(len(blocks), -1)))
        self._stream.synchronize()

    def _wide(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows

    def _ids(self, blocks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(blocks), dtype=torch.long, device=self._rows.device)
