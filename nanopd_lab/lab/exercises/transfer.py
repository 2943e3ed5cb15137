"""Exercises on moving KV blocks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import torch

from nanopd_lab.lab.checking import call, expect
from nanopd_lab.lab.described import Case, Earlier, Tensor, numbers, one_thread
from nanopd_lab.lab.registry import Exercise
from nanopd_lab.transfer.packing import pack_blocks, unpack_blocks
from nanopd_lab.transfer.pipeline import chunk_arrivals

# ---------------------------------------------------------------------- pack


@one_thread()
def check_pack(impl: Callable[[Tensor, Sequence[int]], Tensor]) -> int:
    """Every choice of up to three of four blocks, in every order; then real shapes and long tables."""
    count, earlier = 0, Earlier()
    for pool, blocks in _pools():
        count += 1
        case = _case(impl, "pack_blocks", pool, blocks, "pool, blocks")
        seen: list[Tensor] = []
        got = case.call(_spy(impl, seen), pool=pool, blocks=blocks)
        earlier.compare(case, got)
        case.expect_tensor(got, (len(blocks), *pool.shape[1:]), pool.dtype, "the buffer")
        for row, block in enumerate(blocks):
            if not torch.equal(got[row], pool[block]):
                why = f"row {row} belongs to block {block} = blocks[{row}]{_whose(got[row], pool)}"
                show = f"buffer[{row}] = "
                raise case.wrong(show + numbers(got[row]), show + numbers(pool[block]), why)
        case.expect(
            got.is_contiguous(), f"strides {got.stride()}", "one contiguous buffer", "a link wants one piece"
        )
        same_memory = got.untyped_storage().data_ptr() == seen[-1].untyped_storage().data_ptr()
        why = "this is a view: when the source re-uses the block, what was packed changes with it"
        case.expect(not same_memory, "the pool's own memory", "a copy", why)
    return count


# ---------------------------------------------------------------------- unpack


@one_thread()
def check_unpack(impl: Callable[[Tensor, Sequence[int], Tensor], None]) -> int:
    """The same choices the other way round. Blocks that are not written must stay as they are."""
    count = 0
    for number, (pool, blocks) in enumerate(_pools()):
        count += 1
        buffer = _noise((len(blocks), *pool.shape[1:]), pool.dtype, 1000 + number)
        case = _case(impl, "unpack_blocks", pool, blocks, "pool, blocks, buffer")
        seen: list[Tensor] = []
        got = case.call(_spy(impl, seen), may_change=("pool",), pool=pool, blocks=blocks, buffer=buffer)
        after = seen[-1]
        rows = {block: row for row, block in enumerate(blocks)}
        untouched = torch.equal(after, pool)
        for block in [*blocks, *range(len(pool))]:
            want = buffer[rows[block]] if block in rows else pool[block]
            if not torch.equal(after[block], want):
                if block not in rows:
                    why = f"block {block} is none of {_ids(blocks)}: it is somebody else's"
                elif untouched:
                    why = "nothing was written: change the pool in place (`pool[…] = …`)"
                    why += ", a new tensor is not the pool" if isinstance(got, Tensor) else ""
                else:
                    why = f"block {block} = blocks[{rows[block]}] gets row {rows[block]} of the buffer"
                    why += _whose(after[block], buffer, "row")
                show = f"pool[{block}] = "
                raise case.wrong(show + numbers(after[block]), show + numbers(want), why)
    return count


def _pools() -> Iterator[tuple[Tensor, Sequence[int]]]:
    """A pool and blocks of it, as a transport gives them: in a tuple, and sometimes in a list."""
    small = [order for size in (2, 3, 1) for order in itertools.permutations((3, 0, 1, 2), size)]
    for number, order in enumerate(small):
        yield _noise((4, 1, 2, 1, 2, 2), torch.float32, number), list(order) if number % 3 == 2 else order
    rng = random.Random(0)
    shapes = [(1, 2), (9, 3), (12, 2, 2, 1, 4, 3), (40, 3, 2, 3, 16, 8), (25, 30, 2, 3, 16, 4)]
    dtypes = (torch.float32, torch.bfloat16, torch.uint8)
    for number, (shape, dtype) in enumerate(itertools.product(shapes, dtypes)):
        for share in (0.2, 0.5, 1.0):
            blocks = rng.sample(range(shape[0]), max(1, round(share * shape[0])))
            yield _noise(shape, dtype, number), tuple(blocks)
        start = rng.randrange(shape[0])
        yield _noise(shape, dtype, number), tuple(range(start, shape[0]))  # side by side: a slice would do
        yield _noise(shape, dtype, number), tuple(range(shape[0] - 1, -1, -1))


def _noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.uint8:
        return torch.randint(256, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _spy(impl: Callable[..., Any], seen: list[Tensor]) -> Callable[..., Any]:
    """`impl`, and a look at the pool that it is given: `call` hands out copies.

    Seen is a view of the pool's memory, as the attention backends have: it must see what is written.
    """

    def spying(pool: Tensor, **rest: Any) -> Any:
        seen.append(pool.view(pool.shape))
        return impl(pool, **rest)

    return spying


def _case(impl: Any, name: str, pool: Tensor, blocks: Sequence[int], written: str) -> Case:
    shape = f"pool = Tensor{list(pool.shape)}, {pool.dtype}: [num_blocks, …]"
    lines = (shape, f"blocks = {_ids(blocks)}, a {type(blocks).__name__}")
    return Case(getattr(impl, "__name__", name), lines, written)


def _ids(blocks: Sequence[int]) -> str:
    """The first few ids; the brackets tell a tuple from a list."""
    ids = ", ".join(map(str, blocks[:8])) + (f", … ({len(blocks)} in all)" if len(blocks) > 8 else "")
    return f"[{ids}]" if isinstance(blocks, list) else f"({ids}{',' if len(blocks) == 1 else ''})"


def _whose(found: Tensor, among: Tensor, what: str = "block") -> str:
    for number, each in enumerate(among):
        if torch.equal(found, each):
            return f"; {what} {number} is there"
    return ""


# ---------------------------------------------------------------------- arrivals


def check_arrivals(impl: Callable[[Sequence[float], Sequence[float], bool], list[float]]) -> int:
    """The worked examples, then all small ones in whole seconds, then chunks as long as real ones."""
    count = 0
    for compute_s, copy_s in _chunks():
        for overlap in (True, False):
            count += 1
            want = chunk_arrivals(compute_s, copy_s, overlap)
            got = call(impl, compute_s=compute_s, copy_s=copy_s, overlap=overlap)
            expect(isinstance(got, list), "return a list of seconds, one for each chunk", want)
            expect(len(got) == len(want), f"{len(compute_s)} chunk(s), so as many arrivals", want)
            for chunk, (found, right) in enumerate(zip(got, want, strict=True)):
                number = isinstance(found, Real) and not isinstance(found, bool)
                expect(number, f"arrival {chunk} is not a number of seconds", want)
                if not math.isclose(found, right, rel_tol=1e-9, abs_tol=1e-9):
                    expect(False, _why_arrival(compute_s, copy_s, overlap, chunk, want), want)
    return count


def _chunks() -> Iterator[tuple[list[float], list[float]]]:
    yield [4.0, 4.0, 4.0], [1.0, 1.0, 1.0]
    yield [2.0, 2.0, 2.0], [5.0, 1.0, 1.0]
    yield [1.0, 6.0, 1.0], [3.0, 1.0, 4.0]
    yield [3.0], [2.0]
    yield [0.25, 0.375], [0.125, 0.0625]
    for length in (1, 2, 3):
        for times in itertools.product((1.0, 2.0, 5.0), repeat=2 * length):
            yield list(times[:length]), list(times[length:])
    yield [0.0, 2.0], [1.0, 0.0]
    rng = random.Random(0)
    for slower in (0.1, 1.0, 10.0):
        for _ in range(40):
            length = rng.randint(1, 40)
            compute = [0.05 + 0.1 * rng.random() for _ in range(length)]
            yield compute, [slower * (0.05 + 0.1 * rng.random()) for _ in range(length)]


def _why_arrival(
    compute_s: Sequence[float], copy_s: Sequence[float], overlap: bool, chunk: int, want: Sequence[float]
) -> str:
    computed = sum(compute_s[: chunk + 1])
    begin = want[chunk] - copy_s[chunk]
    if not overlap:
        when = f"without overlap no copy begins before all is computed, at {sum(compute_s):g} s"
    elif chunk and want[chunk - 1] > computed:
        when = f"computed at {computed:g} s, but the link is busy with chunk {chunk - 1} until {want[chunk - 1]:g} s"
    else:
        when = f"computed at {computed:g} s, when the link is free"
    return f"chunk {chunk}: {when}; copied from {begin:g} to {want[chunk]:g} s"


EXERCISES = (
    Exercise(
        name="transfer.pack_blocks",
        notebook="06",
        reference=pack_blocks,
        check=check_pack,
        hints=(
            "Row i of the buffer is block `blocks[i]` of the pool. torch can take many rows of a tensor at once; the "
            "result of that is a new tensor, and contiguous.",
            "Indexing with a *list* of ids (`pool[[3, 0]]`) takes whole blocks and copies them. A transport gives a "
            "tuple, which torch reads as one index a dimension: make a list of it first.",
            "`return pool[list(blocks)]`",
        ),
        cluster_plug=lambda parts, impl: replace(parts, pack=impl),
    ),
    Exercise(
        name="transfer.unpack_blocks",
        notebook="06",
        reference=unpack_blocks,
        check=check_unpack,
        hints=(
            "The reverse of packing: block `blocks[i]` of the pool becomes row i of the buffer. The pool belongs to "
            "the worker, so it is changed in place.",
            "Assigning to an index writes in place: `pool[…] = buffer`. As before, a tuple must become a list.",
            "`pool[list(blocks)] = buffer`, and nothing is returned.",
        ),
        cluster_plug=lambda parts, impl: replace(parts, unpack=impl),
    ),
    Exercise(
        name="transfer.chunk_arrivals",
        notebook="06",
        reference=chunk_arrivals,
        check=check_arrivals,
        hints=(
            "A copy can begin when two things are true: its chunk is ready to be copied, and the link has finished the "
            "copy before it. So it begins at the later of two times.",
            "Keep two running numbers: `computed`, the time at which this chunk is computed, and `link_free`. Without "
            "overlap a chunk is ready when the last one is computed, at `sum(compute_s)`.",
            "For each pair of times: `computed += compute`; `ready = computed if overlap else sum(compute_s)`; "
            "`link_free = max(link_free, ready) + copy`; append `link_free`.",
        ),
    ),
)
