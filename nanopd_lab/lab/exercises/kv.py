"""Exercises on the paged KV cache."""

from __future__ import annotations

from collections.abc import Callable

from nanopd_lab.kv import blocks_for
from nanopd_lab.lab.checking import call, expect
from nanopd_lab.lab.registry import Exercise


def check_blocks_for(impl: Callable[[int, int], int]) -> int:
    """Every number of tokens up to four blocks, for block sizes 1 to 20; then a few as large as real ones."""
    sizes = [*range(1, 21), 128, 256]
    cases = [(tokens, size) for size in sizes for tokens in range(4 * min(size, 20) + 1)]
    cases += [(k * size + rest, size) for size in (16, 128) for k in (7, 8192) for rest in (-1, 0, 1)]
    # Blocks of 16 first, small numbers first, and no tokens at all last: the plainest counterexample.
    cases.sort(key=lambda case: (case[1] != 16, case[1], case[0] == 0, case[0]))
    for tokens, size in cases:
        full, rest = divmod(tokens, size)
        want = full + (rest > 0)
        got = call(impl, tokens=tokens, block_size=size)
        expect(type(got) is not bool and hasattr(got, "__index__"), "a number of blocks is an int", want)
        expect(got == want, _why_blocks(tokens, size, full, rest), want)
    return len(cases)


def _why_blocks(tokens: int, size: int, full: int, rest: int) -> str:
    if tokens == 0:
        return "no tokens need no block"
    if rest == 0:
        return f"{tokens} = {full} x {size}: an exact fit, no token is left over"
    return f"{tokens} = {full} x {size} + {rest}: what is left over ({rest}) takes a block too"


EXERCISES = (
    Exercise(
        name="kv.blocks_for",
        notebook="00",
        reference=blocks_for,
        check=check_blocks_for,
        hints=(
            "Divide, and round up: a block that is only partly filled is still a whole block.",
            "Python's `//` rounds down, so 34 // 16 is 2 and the last two tokens have no home. What must you "
            "add before dividing so that anything left over tips the result to the next integer, and an exact "
            "fit does not?",
            "`(tokens + block_size - 1) // block_size`. Or round down the negative: `-(-tokens // block_size)`.",
        ),
    ),
)
