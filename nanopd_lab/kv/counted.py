"""A block pool for simulations: it counts blocks, and remembers what somebody may still pull.

Nothing is ever written to a simulated block. How many are free decides what a scheduler does; which one is which
matters in one case only: a pull whose source gave its blocks back meanwhile is void if one of them has been handed out
anew. So a block here is a number that it gets when it is handed out, and not a slot whose owners and history are kept.
Blocks go out in the order in which they came back, as from `BlockAllocator`; tests/kv/test_counted.py compares the two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from nanopd_lab.errors import OutOfBlocks
from nanopd_lab.kv.allocator import AllocatorStats


class CountedBlocks:
    """An `Allocator` without a prefix cache, whose blocks have one owner each.

    Args:
        num_blocks: size of the pool
        first: number of the first block that is handed out; they ascend from there

    The blocks of a table follow each other, however it grows: it is a range, and has `num_blocks` numbers to itself.
    """

    enable_prefix_caching = False

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs at least 1 block")
        self.num_blocks = self.num_free = num_blocks
        self._next = first
        self._handed_out = 0
        self._peak_used = 0
        # The free blocks form a queue. Tables that are watched, by their first block: None while somebody holds them,
        # then (place in the queue of the last block, which goes in first; the table), until all have left the queue.
        self._watched: dict[int, tuple[int, Sequence[int]] | None] = {}
        self._given_back: deque[tuple[int, int]] = (
            deque()
        )  # of the watched: place behind the table, its first block

    # ------------------------------------------------------------------ taking and giving back

    def allocate(self, count: int) -> list[int]:
        """See `Allocator`."""
        self.take(count)
        return list(self.name((), count))

    def take(self, count: int) -> None:
        """As `allocate`, without naming the blocks; `name` does. Raises OutOfBlocks."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free")
        self.num_free -= count
        self._handed_out += count

    def name(self, table: Sequence[int], count: int) -> range:
        """The table with so many blocks more, which were taken without a name."""
        if isinstance(table, range):
            return range(table.start, table.stop + count)
        assert not table, "a table that is not empty is a range"
        first = self._next
        self._next = first + self.num_blocks
        return range(first, first + count)

    def release(self, blocks: Sequence[int]) -> None:
        """See `Allocator`; takes a whole table."""
        if not blocks:
            return
        self._note_peak()  # use falls nowhere else
        place = self._handed_out + self.num_free
        free = self.num_free + len(blocks)
        if free > self.num_blocks:
            raise ValueError(f"{free - self.num_blocks} of {len(blocks)} blocks were released twice")
        self.num_free = free
        if blocks[0] in self._watched:
            self._watched[blocks[0]] = (place, blocks)
            self._given_back.append((place + len(blocks), blocks[0]))
        while self._given_back and self._given_back[0][0] <= self._handed_out:
            del self._watched[self._given_back.popleft()[1]]

    # ------------------------------------------------------------------ what is pulled

    def generation(self, block: int) -> int:
        """Always the same: a number never comes back."""
        return 0

    def watch(self, table: Sequence[int]) -> None:
        """From now on somebody may ask `reused` of a table that begins like this one."""
        self._watched.setdefault(table[0], None)

    def reused(self, first: int, blocks: Sequence[int], soon: int = 0) -> bool:
        """True if one of `blocks` has been handed out anew, or is among the next `soon`.

        Args:
            first: the first block of their table, which is watched
            blocks: a part of the table, in its order
        """
        if first not in self._watched:
            return True
        if (given_back := self._watched[first]) is None:
            return False
        place, table = given_back
        return place + len(table) - 1 - table.index(blocks[-1]) < self._handed_out + soon

    # ------------------------------------------------------------------ what only shared and cached blocks need

    def fork(self, blocks: Sequence[int]) -> list[int]:
        """Not here."""
        raise NotImplementedError("counted blocks have one owner; use BlockAllocator")

    def is_shared(self, block: int) -> bool:
        """Never."""
        return False

    def copy_on_write(self, block: int) -> int:
        """Not here."""
        raise NotImplementedError("counted blocks have one owner; use BlockAllocator")

    def count_match(self, hashes: Iterable[bytes]) -> tuple[int, int]:
        """Nothing is cached."""
        return 0, 0

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Nothing is cached."""
        return []

    def register(self, block: int, content: bytes) -> None:
        """Ignored: caching is off."""

    # ------------------------------------------------------------------ looking after itself

    def stats(self) -> AllocatorStats:
        """See `Allocator`."""
        self._note_peak()
        used = self.num_blocks - self.num_free
        return AllocatorStats(
            num_blocks=self.num_blocks,
            free=self.num_free,
            evictable=0,
            used=used,
            allocated_total=self._handed_out,
            prefix_hits_total=0,
            evictions_total=0,
            copies_total=0,
            peak_used=self._peak_used,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if the count is off."""
        assert 0 <= self.num_free <= self.num_blocks, f"{self.num_free} of {self.num_blocks} blocks are free"
        held = sum(each is None for each in self._watched.values())
        assert held + len(self._given_back) == len(self._watched), "a watched table is lost"

    def _note_peak(self) -> None:
        used = self.num_blocks - self.num_free
        if used > self._peak_used:
            self._peak_used = used
