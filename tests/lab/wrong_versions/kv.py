"""Versions of the exercises on the paged KV cache."""

from __future__ import annotations

import math

from tests.lab.wrong_versions.base import Version


def rounds_down(tokens, block_size):
    return tokens // block_size


def always_one_more(tokens, block_size):
    return tokens // block_size + 1


def at_least_one(tokens, block_size):
    return max(1, math.ceil(tokens / block_size))


def a_float(tokens, block_size):
    return math.floor(tokens / block_size) + (1.0 if tokens % block_size else 0.0)


def always_sixteen(tokens, block_size):
    return (tokens + 15) // 16


def rounds_to_nearest(tokens, block_size):
    return round(tokens / block_size)


def adds_too_much(tokens, block_size):
    return (tokens + block_size) // block_size


def forgets_return(tokens, block_size):
    -(-tokens // block_size)


def swapped(tokens, block_size):
    return -(-block_size // tokens)


def never_ends(tokens, block_size):
    count = 0
    while tokens != 0:
        tokens -= block_size
        count += 1
    return count


def with_ceil(tokens, block_size):
    return math.ceil(tokens / block_size)


def counting(tokens, block_size):
    count = 0
    while tokens > 0:
        tokens -= block_size
        count += 1
    return count


WRONG: dict[str, list[tuple[Version, str]]] = {
    "kv.blocks_for": [
        (rounds_down, "what is left over (1) takes a block too"),
        (always_one_more, "16 = 1 x 16: an exact fit"),
        (at_least_one, "no tokens need no block"),
        (a_float, "a number of blocks is an int"),
        (always_sixteen, "block_size=1)"),
        (rounds_to_nearest, "takes a block too"),
        (adds_too_much, "an exact fit"),
        (forgets_return, "is a `return` missing?"),
        (swapped, "got   16"),
        (never_ends, "is there a loop that never ends?"),
    ],
}

RIGHT: dict[str, list[Version]] = {
    "kv.blocks_for": [with_ceil, counting],
}
