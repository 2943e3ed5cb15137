"""`CountedBlocks` against `BlockAllocator`: as many are free at any time, and the same ones are handed out anew."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.errors import OutOfBlocks
from nanopd_lab.kv import BlockAllocator, CountedBlocks


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_the_same_blocks_are_handed_out_anew(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 12))
    real, counted = BlockAllocator(size, enable_prefix_caching=False), CountedBlocks(size, 1 << 32)
    held: list[tuple[list[int], Sequence[int]]] = []  # tables, of both pools
    seen: list[tuple[list[int], Sequence[int], list[int]]] = []  # published: both tables, generations
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["begin", "grow", "give back", "publish"]))
        if what == "begin" or not held:
            held.append(([], []))
        table, numbers = data.draw(st.sampled_from(held))
        if what == "give back":
            held.remove((table, numbers))
            real.release(table)
            counted.release(numbers)
        elif what == "publish" and numbers:
            counted.watch(numbers)
            seen.append((list(table), numbers, [real.generation(block) for block in table]))
        elif what != "publish":
            count = data.draw(st.integers(0, 4))
            if count > real.num_free:
                with pytest.raises(OutOfBlocks):
                    counted.take(count)
                continue
            if count:
                place = held.index((table, numbers))
                counted.take(count)
                held[place] = table + real.allocate(count), counted.name(numbers, count)
        held = [pair for pair in held if pair[0]]
        for blocks, theirs, generations in seen:
            start = data.draw(st.integers(0, len(blocks) - 1))
            pairs = list(zip(blocks, generations, strict=True))[start:]
            stale = any(real.generation(block) != generation for block, generation in pairs)
            assert counted.reused(theirs[0], theirs[start:]) == stale
            soon = data.draw(st.integers(0, real.num_free))
            if not stale:
                next_ones = list(real.free)[:soon]
                free_again = any(block in next_ones for block, _ in pairs)
                assert counted.reused(theirs[0], theirs[start:], soon) == free_again
        assert counted.num_free == real.num_free
        assert (counted.stats().used, counted.stats().peak_used) == (
            real.stats().used,
            real.stats().peak_used,
        )
        counted.check_integrity()


def test_what_it_cannot_do_is_said() -> None:
    pool = CountedBlocks(4)
    table = pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 blocks asked for, 1 of 4 are free"):
        pool.allocate(2)
    pool.release(table)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(table)
    with pytest.raises(NotImplementedError, match="BlockAllocator"):
        pool.fork(table)
    with pytest.raises(ValueError, match="at least 1"):
        CountedBlocks(0)
    assert pool.num_free == 4
