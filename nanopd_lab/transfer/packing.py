"""Scattered blocks into one buffer, and out of it into other blocks.

A sequence's blocks lie anywhere in its pool, and will lie anywhere in the next one. In between they travel as one
contiguous piece, which is what links are fast at. Pools are block-major, so a block is contiguous itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pack_blocks(pool: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """Copies of these blocks in this order: `[num_blocks, ...]` gives a new, contiguous `[len(blocks), ...]`."""
    return pool.index_select(0, _ids(pool, blocks))


def unpack_blocks(pool: torch.Tensor, blocks: Sequence[int], buffer: torch.Tensor) -> None:
    """Write `buffer[i]` to block `blocks[i]` of the pool, in place; every other block stays as it is.

    buffer: `[len(blocks), ...]`, as `pack_blocks` makes it; the pool `[num_blocks, ...]`
    """
    pool.index_copy_(0, _ids(pool, blocks), buffer)


def _ids(pool: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    import torch  # not above: settings of a cluster name these functions, and settings load no torch

    return torch.tensor(list(blocks), dtype=torch.long, device=pool.device)
