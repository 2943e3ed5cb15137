"""What travels of a chunk of blocks: each block as it lies in its pool, or all of them packed into a buffer.

A block is contiguous, so a large one is sent from where it is and received where it belongs; a message each costs too
much for small ones, and on GPUs for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanopd_lab.cpu import block_copy
from nanopd_lab.transfer.base import Pool

DIRECT_BYTES = 256 << 10  # from here on, on CPUs: a message takes some 50 us, a copy of as much too
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}


class Staging:
    """One end of a link. Both ends come to the same messages, as they have the same block size and kind of device.

    Args:
        pool: sent from, or received into
        slots: chunks that may be under way
    """

    def __init__(self, pool: Pool, slots: int) -> None:
        device, size = pool.memory.device, pool.block_bytes
        self.blocks_each = max(1, CHUNK_BYTES[device.type] // size)
        self._size, self._direct = size, device.type == "cpu" and size >= DIRECT_BYTES
        self._rows = pool.memory.view(pool.num_blocks, -1).view(torch.uint8)
        length = 0 if self._direct else self.blocks_each * size
        self._buffers = [torch.empty(length, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def outgoing(self, number: int, blocks: Sequence[int]) -> list[torch.Tensor]:
        """The messages of the number-th chunk, ready to be sent: uint8, contiguous."""
        if self._direct:
            return [self._rows[block] for block in blocks]
        buffer = self._buffer(number, blocks)
        if self._stream is None:
            block_copy.copy_blocks(
                self._rows.data_ptr(), blocks, buffer.data_ptr(), range(len(blocks)), self._size
            )
        else:
            with torch.cuda.stream(self._stream):
                rows = _wide(self._rows)
                torch.index_select(rows, 0, self._ids(blocks), out=_wide(buffer.view(len(blocks), -1)))
            self._stream.synchronize()
        return [buffer]

    def incoming(self, number: int, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Where to receive them; then `take_in`."""
        return [self._rows[block] for block in blocks] if self._direct else [self._buffer(number, blocks)]

    def take_in(self, number: int, blocks: Sequence[int], after: torch.cuda.Event | None = None) -> None:
        """To their blocks of the pool; done when it returns. after: what may still write to these on a GPU"""
        if self._direct:
            return
        buffer = self._buffer(number, blocks)
        if self._stream is None:
            block_copy.copy_blocks(
                buffer.data_ptr(), range(len(blocks)), self._rows.data_ptr(), blocks, self._size
            )
            return
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            _wide(self._rows).index_copy_(0, self._ids(blocks), _wide(buffer.view(len(blocks), -1)))
        self._stream.synchronize()

    def _buffer(self, number: int, blocks: Sequence[int]) -> torch.Tensor:
        return self._buffers[number % len(self._buffers)][: len(blocks) * self._size]

    def _ids(self, blocks: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(blocks), dtype=torch.long, device=self._rows.device)


def _wide(rows: torch.Tensor) -> torch.Tensor:
    return rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows
