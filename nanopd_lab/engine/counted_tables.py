"""Block tables of a pool that only counts: ranges, which take neither room nor time for being long."""

from __future__ import annotations

from nanopd_lab.core import BlockCopy, Sequence
from nanopd_lab.engine.block_manager import BlockManager
from nanopd_lab.kv import CountedBlocks, blocks_for


class CountedTables(BlockManager):
    """As `BlockManager`, where no block is shared, cached, or looked at by itself."""

    def __init__(self, pool: CountedBlocks, block_size: int) -> None:
        super().__init__(pool, block_size)
        self.pool = pool

    def missing(self, sequence: Sequence, count: int) -> int:
        """See `BlockManager`."""
        return max(0, blocks_for(sequence.num_computed + count, self.block_size) - len(sequence.blocks))

    def extend(self, sequence: Sequence, count: int) -> list[BlockCopy]:
        """See `BlockManager`."""
        more = self.missing(sequence, count)
        if more:
            self.pool.take(more)
            sequence.blocks = self.pool.name(sequence.blocks, more)
        return []
