"""The allocator against its own invariants, by hand and by random walks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nanopd_lab.errors import OutOfBlocks
from nanopd_lab.kv import BlockAllocator, blocks_for, hash_block, slots


@pytest.mark.parametrize(
    ("tokens", "size", "blocks"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2)]
)
def test_blocks_for(tokens: int, size: int, blocks: int) -> None:
    assert blocks_for(tokens, size) == blocks


def test_slots_follow_the_block_table() -> None:
    assert slots([7, 2], start=2, count=4, block_size=4) == [30, 31, 8, 9]


def test_hash_depends_on_the_whole_prefix() -> None:
    first, other = hash_block(b"", [1, 2]), hash_block(b"", [1, 3])
    assert hash_block(first, [5, 6]) != hash_block(other, [5, 6])
    assert hash_block(first, [5, 6]) == hash_block(hash_block(b"", [1, 2]), [5, 6])


def test_too_few_blocks_takes_nothing() -> None:
    pool = BlockAllocator(4)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks, match=r"2 blocks asked for, 1 of 4 are free.*kv_cache_memory_bytes"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity()


def test_released_twice_is_refused_and_changes_nothing() -> None:
    pool = BlockAllocator(4)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(ValueError, match="cannot release block"):
        pool.release(blocks)
    other = pool.allocate(1)
    with pytest.raises(ValueError, match="cannot release block"):
        pool.release([*other, *other])
    assert pool.ref_count(other[0]) == 1
    with pytest.raises(ValueError, match="ids run from 0 to 3"):
        pool.release([9])
    pool.check_integrity()


def test_fork_and_copy_on_write() -> None:
    pool = BlockAllocator(4)
    parent = pool.allocate(2)
    child = pool.fork(parent)
    assert child == parent
    assert pool.is_shared(parent[1])
    fresh = pool.copy_on_write(child[1])
    assert fresh not in parent
    assert not pool.is_shared(parent[1])
    with pytest.raises(ValueError, match="only a shared block is copied"):
        pool.copy_on_write(parent[1])
    pool.release(parent)
    pool.release([child[0], fresh])
    assert pool.num_free == 4
    assert pool.stats().copies_total == 1


def test_generation_tells_that_a_block_was_reused() -> None:
    pool = BlockAllocator(1)
    (block,) = pool.allocate(1)
    before = pool.generation(block)
    pool.release([block])
    pool.allocate(1)
    assert pool.generation(block) == before + 1


def test_prefix_is_found_until_evicted_oldest_tail_first() -> None:
    pool = BlockAllocator(3)
    blocks = pool.allocate(3)
    chain = [b"a", b"ab", b"abc"]
    for block, content in zip(blocks, chain, strict=True):
        pool.register(block, content)
    pool.release(blocks)
    assert pool.num_free == 3
    assert pool.count_match(chain) == (3, 3)
    pool.allocate(1)  # takes the tail: the head is useful without it, not the reverse
    assert pool.count_match(chain) == (2, 2)
    assert pool.match(chain) == blocks[:2]
    assert pool.num_free == 0
    assert pool.stats().evictions_total == 1


def test_without_prefix_caching_nothing_is_remembered() -> None:
    pool = BlockAllocator(2, enable_prefix_caching=False)
    (block,) = pool.allocate(1)
    pool.register(block, b"a")
    pool.release([block])
    assert pool.match([b"a"]) == []
    assert pool.stats().evictable == 0


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockAllocator(0)


class Pool(RuleBasedStateMachine):
    """Owners take, share, copy, register and give back; every reference is accounted for by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockAllocator(12)
        self.owners: list[list[int]] = []
        self.contents = 0

    def refs(self) -> dict[int, int]:
        counts: dict[int, int] = {}
        for owner in self.owners:
            for block in owner:
                counts[block] = counts.get(block, 0) + 1
        return counts

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        held = self.refs()
        if count > 12 - len(held):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
        else:
            taken = self.pool.allocate(count)
            assert len(set(taken)) == count
            assert not set(taken) & set(held), "handed out a block that somebody holds"
            self.owners.append(taken)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.owners.append(self.pool.fork(data.draw(st.sampled_from(self.owners))))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data())
    def copy_on_write(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([owner for owner in self.owners if owner]))
        position = data.draw(st.integers(0, len(owner) - 1))
        held = self.refs()
        if held[owner[position]] > 1 and len(held) < 12:
            fresh = self.pool.copy_on_write(owner[position])
            assert fresh not in held
            owner[position] = fresh

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data(), again=st.booleans())
    def register(self, data: st.DataObject, again: bool) -> None:
        owner = data.draw(st.sampled_from([owner for owner in self.owners if owner]))
        if not again:
            self.contents += 1
        self.pool.register(data.draw(st.sampled_from(owner)), str(self.contents).encode())

    @rule(content=st.integers(0, 20))
    def match(self, content: int) -> None:
        chain = [str(content).encode()]
        expected = self.pool.count_match(chain)[0]
        taken = self.pool.match(chain)
        assert len(taken) == expected
        self.owners.append(taken)

    @invariant()
    def accounts_balance(self) -> None:
        self.pool.check_integrity()
        held = self.refs()
        assert self.pool.num_free == 12 - len(held)
        for block in range(12):
            assert self.pool.ref_count(block) == held.get(block, 0)


Pool.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestPool = Pool.TestCase
