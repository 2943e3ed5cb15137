"""Arithmetic of block tables: how many blocks, which slots, and the hash chain of full blocks."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that `tokens` tokens occupy: ceil(tokens / block_size)."""
    return -(-tokens // block_size)


def slots(blocks: Sequence[int], start: int, count: int, block_size: int) -> list[int]:
    """Slots of token positions `[start, start + count)`: `block id * block_size + offset in the block`."""
    return [blocks[p // block_size] * block_size + p % block_size for p in range(start, start + count)]


def hash_block(parent: bytes, tokens: Sequence[int]) -> bytes:
    """16-byte hash of a full block's tokens and of everything before them.

    KV of a token depends on the whole prefix, so a block's identity must too: each hash covers its parent's
    (vLLM's hash chain). BLAKE2b rather than Python's `hash`, so that two different prefixes do not collide in
    practice and two processes agree.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
