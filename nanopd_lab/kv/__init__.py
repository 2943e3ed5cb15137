"""Paged KV memory: which block belongs to whom (no torch), and the tensor the blocks index."""

from nanopd_lab.kv.allocator import Allocator, AllocatorStats, BlockAllocator
from nanopd_lab.kv.blocks import blocks_for, hash_block, slots
from nanopd_lab.kv.counted import CountedBlocks
from nanopd_lab.kv.tables import grow_table, prefix_hashes

__all__ = [
    "Allocator",
    "AllocatorStats",
    "BlockAllocator",
    "CountedBlocks",
    "blocks_for",
    "grow_table",
    "hash_block",
    "prefix_hashes",
    "slots",
]
