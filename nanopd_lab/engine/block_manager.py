"""The block tables of sequences: what each holds, shares, lacks, and finds in the prefix cache."""

from __future__ import annotations

from collections.abc import Iterable

from nanopd_lab.core import BlockCopy, Sequence
from nanopd_lab.kv import Allocator, blocks_for, grow_table, hash_block, prefix_hashes


class BlockManager:
    """Moves blocks between the allocator and the sequences. Mutates a sequence's `blocks`, `num_computed`,
    `block_hashes`, `num_registered` and `tokens_cached`, and nothing else.

    Args:
        allocator: the pool; this is its only user
        block_size: tokens a block

    A subclass may replace `grow_table` and `prefix_hashes`, as functions with the same meaning.
    """

    grow_table = staticmethod(grow_table)
    prefix_hashes = staticmethod(prefix_hashes)

    def __init__(self, allocator: Allocator, block_size: int) -> None:
        self.allocator = allocator
        self.block_size = block_size
        # An allocator that doesn't say is taken to cache.
        self.caching = getattr(allocator, "enable_prefix_caching", True)

    def missing(self, sequence: Sequence, count: int) -> int:
        """Free blocks that computing `count` more tokens takes: new ones, and copies of shared ones."""
        written = sequence.blocks[sequence.num_computed // self.block_size :]
        shared = sum(self.allocator.is_shared(block) for block in written)
        new = blocks_for(sequence.num_computed + count, self.block_size) - len(sequence.blocks)
        return shared + max(0, new)

    def extend(self, sequence: Sequence, count: int) -> list[BlockCopy]:
        """Give the sequence blocks of its own to write its next `count` tokens to.

        Returns:
            the copies to make before the step: a block that others share must not be written

        Raises:
            OutOfBlocks: fewer than `missing(sequence, count)` are free.
        """
        copies: list[BlockCopy] = []
        blocks, start, size = sequence.blocks, sequence.num_computed, self.block_size
        assert isinstance(blocks, list)
        for position in range(start // size, len(blocks)):
            block = blocks[position]
            if self.allocator.is_shared(block):
                blocks[position] = fresh = self.allocator.copy_on_write(block)
                copies.append(BlockCopy(block, fresh))
        if start + count > len(blocks) * size:
            self.grow_table(blocks, start + count, size, self.allocator)
        return copies

    def fork(self, parent: Sequence) -> list[int]:
        """A table for one more owner of all of the parent's blocks."""
        return self.allocator.fork(parent.blocks)

    def release(self, sequence: Sequence) -> None:
        """Give all blocks back; the sequence's KV is then to be computed anew."""
        self.allocator.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_registered = 0

    # ------------------------------------------------------------------ prefix cache

    def cached(self, sequence: Sequence) -> tuple[int, int]:
        """(leading blocks of the sequence that are in the cache, how many of them count as free now)."""
        return self.allocator.count_match(self._prefix(sequence)) if self.caching else (0, 0)

    def attach_cached(self, sequence: Sequence) -> None:
        """Start the sequence's table with what the cache has of it."""
        if not self.caching:
            return
        sequence.blocks = self.allocator.match(self._prefix(sequence))
        sequence.num_registered = len(sequence.blocks)
        sequence.num_computed = len(sequence.blocks) * self.block_size
        sequence.tokens_cached += sequence.num_computed

    def register(self, sequence: Sequence, end: int) -> None:
        """Offer the full blocks of tokens `[0, end)` to the cache. Only after the step that computed them."""
        full = end // self.block_size
        if full == sequence.num_registered or not self.caching:
            return
        self._extend_hashes(sequence, full)
        for position in range(sequence.num_registered, full):
            self.allocator.register(sequence.blocks[position], sequence.block_hashes[position])
        sequence.num_registered = full

    def _prefix(self, sequence: Sequence) -> list[bytes]:
        assert not sequence.pending
        # Never all tokens: one must be computed, for its logits.
        usable = (len(sequence.tokens) - 1) // self.block_size
        if len(sequence.block_hashes) < usable:  # it is asked in every step that the sequence waits
            sequence.block_hashes = self.prefix_hashes(sequence.tokens, self.block_size)
        return sequence.block_hashes[:usable]

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) < count:
            start = len(hashes) * size
            hashes.append(hash_block(hashes[-1] if hashes else b"", sequence.tokens[start : start + size]))

    # ------------------------------------------------------------------ looking after itself

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the pool's used blocks are exactly those that `sequences` hold."""
        self.allocator.check_integrity()
        owners: dict[int, int] = {}
        for sequence in sequences:
            assert len(set(sequence.blocks)) == len(sequence.blocks), f"{sequence} holds a block twice"
            assert len(sequence.blocks) * self.block_size >= sequence.num_computed, f"{sequence} lacks blocks"
            for block in sequence.blocks:
                owners[block] = owners.get(block, 0) + 1
        used = self.allocator.stats().used
        assert used == len(owners), f"{used} blocks in use, sequences hold {len(owners)}"
