"""What a block table needs to grow and to be found again: two functions that the engine lets one replace."""

from __future__ import annotations

from collections.abc import Sequence

from nanopd_lab.kv.allocator import Allocator
from nanopd_lab.kv.blocks import blocks_for, hash_block


def grow_table(table: list[int], tokens: int, block_size: int, allocator: Allocator) -> None:
    """Append blocks to `table` until it has room for `tokens` tokens; never takes one away.

    Raises:
        OutOfBlocks: too few are free; `table` and the pool are as before.
    """
    missing = blocks_for(tokens, block_size) - len(table)
    if missing > 0:
        table.extend(allocator.allocate(missing))


def prefix_hashes(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of the leading full blocks that a sequence may take from the cache, each chained to the one before.

    Never all of the tokens: the last one must be computed, for its logits, so a block that ends with it is not
    among them. The first block's parent is `b""`.
    """
    hashes: list[bytes] = []
    for number in range((len(tokens) - 1) // block_size):
        block = tokens[number * block_size : (number + 1) * block_size]
        hashes.append(hash_block(hashes[-1] if hashes else b"", block))
    return hashes
