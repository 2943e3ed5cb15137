"""Packing and unpacking are inverse, and the pipeline's times are those of the two-machine flow shop."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.transfer.packing import pack_blocks, unpack_blocks
from nanopd_lab.transfer.pipeline import chunk_arrivals

seconds = st.integers(0, 20)
chunks = st.lists(st.tuples(seconds, seconds), min_size=1, max_size=8)


@given(st.permutations(range(6)), st.permutations(range(9)), st.integers(1, 6))
def test_blocks_come_out_where_they_should_and_nothing_else_changes(
    sources: list[int], targets: list[int], count: int
) -> None:
    source = torch.arange(6 * 4.0).view(6, 2, 2)
    target = torch.full((9, 2, 2), -1.0)
    buffer = pack_blocks(source, tuple(sources[:count]))
    assert buffer.is_contiguous()
    source.fill_(99)  # the buffer is a copy
    unpack_blocks(target, targets[:count], buffer)
    for number in range(9):
        row = targets.index(number)
        want = torch.arange(4.0).view(2, 2) + 4 * sources[row] if row < count else torch.full((2, 2), -1.0)
        assert torch.equal(target[number], want)


def test_a_worked_example() -> None:
    assert chunk_arrivals([4, 4, 4], [1, 1, 1], overlap=True) == [5, 9, 13]
    assert chunk_arrivals([4, 4, 4], [1, 1, 1], overlap=False) == [13, 14, 15]
    assert chunk_arrivals([1, 1, 1], [4, 4, 4], overlap=True) == [5, 9, 13]
    assert chunk_arrivals([], [], overlap=True) == []
    with pytest.raises(ValueError, match="shorter"):
        chunk_arrivals([1, 2], [1], overlap=True)


@given(chunks)
def test_the_last_arrival_is_johnsons(times: list[tuple[int, int]]) -> None:
    compute, copy = [list(each) for each in zip(*times, strict=True)]
    longest = max(sum(compute[: k + 1]) + sum(copy[k:]) for k in range(len(times)))
    with_overlap, without = (chunk_arrivals(compute, copy, overlap) for overlap in (True, False))
    assert with_overlap[-1] == longest
    assert without[-1] == sum(compute) + sum(copy)
    assert all(a <= b for a, b in zip(with_overlap, without, strict=True))


@given(chunks, st.booleans())
def test_the_link_carries_one_chunk_at_a_time_and_only_what_is_computed(
    times: list[tuple[int, int]], overlap: bool
) -> None:
    compute, copy = [list(each) for each in zip(*times, strict=True)]
    ends = chunk_arrivals(compute, copy, overlap)
    begins = [end - each for end, each in zip(ends, copy, strict=True)]
    assert all(later >= end for end, later in zip(ends, begins[1:], strict=False))
    assert all(begin >= done for begin, done in zip(begins, itertools.accumulate(compute), strict=True))
    # And no copy waits for nothing: it begins when its chunk is ready or when the link gets free.
    ready = list(itertools.accumulate(compute)) if overlap else [sum(compute)] * len(compute)
    assert all(begin == max(r, free) for begin, r, free in zip(begins, ready, [0, *ends], strict=False))
