"""The block allocator: who owns which block of the KV pool.

A pure state machine over integers. Each block is in exactly one of three states:

    free       on the free list, content meaningless
    used       reference count >= 1; writable only while the count is 1
    evictable  reference count 0 but its content is registered in the prefix cache; re-used by a request
               with the same prefix, or evicted (least recently released first) when free blocks run out

Reference counting and copy-on-write follow vLLM's PagedAttention (Kwon et al., SOSP 2023, section 4.4);
content-addressed full blocks with LRU eviction follow vLLM's automatic prefix caching.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from nanopd_lab.errors import OutOfBlocks


@dataclass(frozen=True)
class AllocatorStats:
    """Where the blocks are now, and what has happened so far (all counts of blocks)."""

    num_blocks: int
    free: int
    evictable: int
    used: int
    allocated_total: int
    prefix_hits_total: int
    evictions_total: int
    copies_total: int
    peak_used: int


class Allocator(Protocol):
    """What the scheduler needs of an allocator; a learner's own goes in here."""

    num_blocks: int

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now, evictable ones included."""
        ...

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with reference count 1; OutOfBlocks (and nothing taken) if too few."""
        ...

    def fork(self, blocks: Sequence[int]) -> list[int]:
        """Share all of `blocks` with one more owner."""
        ...

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block."""
        ...

    def is_shared(self, block: int) -> bool:
        """True if more than one owner holds the block, so that it must not be written."""
        ...

    def copy_on_write(self, block: int) -> int:
        """Swap one reference to a shared block for a fresh block, whose content the caller must copy."""
        ...

    def count_match(self, hashes: Iterable[bytes]) -> tuple[int, int]:
        """(leading hashes that are cached, how many of those blocks are evictable now)."""
        ...

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Take a reference to each leading cached block, up to the first miss."""
        ...

    def register(self, block: int, content: bytes) -> None:
        """Offer a full block's content to the prefix cache; ignored if caching is off."""
        ...

    def stats(self) -> AllocatorStats:
        """Counts for people."""
        ...

    def check_integrity(self) -> None:
        """Raise AssertionError if any invariant is broken."""
        ...


@lru_cache(maxsize=4)
def _ids(num_blocks: int) -> tuple[int, ...]:
    """Shared by all pools of this size: a thousand simulated ones would else hold millions of numbers."""
    return tuple(range(num_blocks))


class BlockAllocator:
    """Reference-counted blocks with copy-on-write and a prefix cache.

    Args:
        num_blocks: size of the pool; ids are 0 … num_blocks - 1
        enable_prefix_caching: keep released full blocks findable by content until they are needed

    State, which only the methods change, and a subclass that replaces some of them:
        free:         ids on the free list, taken from the left
        refs:         owners of each block
        generations:  how often each block has been handed out for new content, so that a late reader can tell
        contents:     the hash under which each block is registered, or None
        block_of:     the registered block of a hash
        evictable:    registered blocks without an owner, oldest release first
        hits, copies, evictions: counts for `stats`
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; a pool needs at least 1 block")
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.free: deque[int] = deque(_ids(num_blocks))
        self.refs = [0] * num_blocks
        self.generations: MutableSequence[int] = [0] * num_blocks
        self.contents: list[bytes | None] = [None] * num_blocks
        self.block_of: dict[bytes, int] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.hits = self.copies = self.evictions = 0
        self._peak_used = 0

    # ------------------------------------------------------------------ taking and giving back

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now, evictable ones included."""
        return len(self.free) + len(self.evictable)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with reference count 1. Free blocks go first, evicted ones after them.

        Raises:
            OutOfBlocks: fewer than `count` are free; nothing has been taken.
        """
        if count > self.num_free:
            raise OutOfBlocks(
                f"{count} blocks asked for, {self.num_free} of {self.num_blocks} are free; "
                "release some or raise kv_cache_memory_bytes"
            )
        free, refs, generations = self.free, self.refs, self.generations
        if count <= len(free):
            take = free.popleft
            taken = [take() for _ in range(count)]
        else:
            taken = [free.popleft() if free else self.evict() for _ in range(count)]
        for block in taken:
            refs[block] = 1
            generations[block] += 1
        return taken

    def fork(self, blocks: Sequence[int]) -> list[int]:
        """Share all of `blocks` with one more owner; returns that owner's table.

        Raises:
            ValueError: a block is not in use; nothing has changed.
        """
        for block in blocks:
            self.require_used(block, "fork")
        for block in blocks:
            self.refs[block] += 1
        return list(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one reference to each block. Unregistered blocks become free, cached ones evictable.

        The last block goes first: a block of a prefix is useless without those before it, so the tail must
        be evicted before the head.

        Raises:
            ValueError: a block is not in use (released twice); nothing has been released.
        """
        self._note_peak()  # use falls nowhere else
        refs, contents, free, num_blocks = self.refs, self.contents, self.free, self.num_blocks
        if len(set(blocks)) < len(blocks):
            need: dict[int, int] = {}
            for block in blocks:
                need[block] = need.get(block, 0) + 1
            for block, times in need.items():
                self.require_used(block, "release", times)
        elif blocks and (
            min(blocks) < 0 or max(blocks) >= num_blocks or not all(map(refs.__getitem__, blocks))
        ):
            for block in blocks:
                self.require_used(block, "release")
        # Mostly each has one owner and none is cached.
        if not self.block_of and sum(map(refs.__getitem__, blocks)) == len(blocks):
            for block in blocks:
                refs[block] = 0
            free.extend(reversed(blocks))
            return
        for block in reversed(blocks):
            refs[block] = owners = refs[block] - 1
            if not owners:
                if contents[block] is None:
                    free.append(block)
                else:
                    self.evictable[block] = None

    # ------------------------------------------------------------------ sharing

    def ref_count(self, block: int) -> int:
        """Owners of the block."""
        return self.refs[block]

    def generation(self, block: int) -> int:
        """How often the block has been handed out for new content."""
        return self.generations[block]

    def is_shared(self, block: int) -> bool:
        """True if more than one owner holds the block, so that it must not be written."""
        return self.refs[block] > 1

    def copy_on_write(self, block: int) -> int:
        """Swap one reference to a shared block for a fresh block, whose content the caller must copy.

        Raises:
            ValueError: the block is not shared (write to it instead)
            OutOfBlocks: no block is free; nothing has changed.
        """
        if not self.is_shared(block):
            raise ValueError(f"block {block} has {self.refs[block]} owner(s); only a shared block is copied")
        (fresh,) = self.allocate(1)
        self.refs[block] -= 1
        self.copies += 1
        return fresh

    # ------------------------------------------------------------------ prefix cache

    def count_match(self, hashes: Iterable[bytes]) -> tuple[int, int]:
        """(leading hashes that are cached, how many of those blocks are evictable now); takes nothing."""
        matched = evictable = 0
        for content in hashes:
            block = self.block_of.get(content)
            if block is None:
                break
            matched += 1
            evictable += self.refs[block] == 0
        return matched, evictable

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Take a reference to each leading cached block, up to the first miss."""
        taken = []
        for content in hashes:
            block = self.block_of.get(content)
            if block is None:
                break
            if self.refs[block] == 0:
                del self.evictable[block]
            self.refs[block] += 1
            taken.append(block)
        self.hits += len(taken)
        return taken

    def register(self, block: int, content: bytes) -> None:
        """Offer a full, written block to the prefix cache under its content hash.

        The first block with a content stays the cached one; a second copy is freed on release as usual.
        """
        self.require_used(block, "register")
        if self.enable_prefix_caching and self.contents[block] is None and content not in self.block_of:
            self.contents[block] = content
            self.block_of[content] = block

    def evict(self) -> int:
        """Forget the content of the block that was released longest ago, and take it."""
        block, _ = self.evictable.popitem(last=False)
        content = self.contents[block]
        assert content is not None
        del self.block_of[content]
        self.contents[block] = None
        self.evictions += 1
        return block

    # ------------------------------------------------------------------ looking after itself

    def stats(self) -> AllocatorStats:
        """Where the blocks are now, and what has happened so far."""
        self._note_peak()
        return AllocatorStats(
            num_blocks=self.num_blocks,
            free=len(self.free),
            evictable=len(self.evictable),
            used=self.num_blocks - self.num_free,
            allocated_total=sum(self.generations),
            prefix_hits_total=self.hits,
            evictions_total=self.evictions,
            copies_total=self.copies,
            peak_used=self._peak_used,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if a block is in two states or none, or the cache's two maps disagree."""
        free, evictable = set(self.free), set(self.evictable)
        assert len(free) == len(self.free), "a block is on the free list twice"
        assert not free & evictable, f"blocks {free & evictable} are both free and evictable"
        assert min(self.refs) >= 0, "a block was released twice"
        used = {block for block, refs in enumerate(self.refs) if refs}
        assert not used & free, f"blocks {used & free} are both used and free"
        assert not used & evictable, f"blocks {used & evictable} are both used and evictable"
        assert len(used) + len(free) + len(evictable) == self.num_blocks, "a block is in no state"
        cached: dict[bytes, int] = {}
        if self.contents.count(None) < self.num_blocks:
            cached = {content: block for block, content in enumerate(self.contents) if content is not None}
        registered = set(cached.values())
        assert evictable <= registered, f"blocks {evictable - registered} are evictable, uncached"
        assert not free & registered, f"blocks {free & registered} are free but cached"
        assert cached == self.block_of, "the prefix cache's maps disagree"

    def _note_peak(self) -> None:
        self._peak_used = max(self._peak_used, self.num_blocks - self.num_free)

    def require_used(self, block: int, verb: str, times: int = 1) -> None:
        """Raise ValueError unless the block exists and has at least `times` owners."""
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"cannot {verb} block {block}; ids run from 0 to {self.num_blocks - 1}")
        if self.refs[block] < times:
            raise ValueError(
                f"cannot {verb} block {block} {'twice' if times > 1 else ''}: it has {self.refs[block]} owner(s)"
            )
