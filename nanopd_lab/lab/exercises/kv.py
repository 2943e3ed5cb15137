"""Exercises on the paged KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from nanopd_lab.errors import OutOfBlocks
from nanopd_lab.kv import BlockAllocator, blocks_for, grow_table, hash_block, prefix_hashes
from nanopd_lab.lab.checking import Steps, call, compact, expect
from nanopd_lab.lab.pieces import plug_piece
from nanopd_lab.lab.pool_walk import Operation, check_walks
from nanopd_lab.lab.registry import Exercise


def check_blocks_for(impl: Callable[[int, int], int]) -> int:
    """Every number of tokens up to four blocks, for block sizes 1 to 20; then a few as large as real ones."""
    sizes = [*range(1, 21), 128, 256]
    cases = [(tokens, size) for size in sizes for tokens in range(4 * min(size, 20) + 1)]
    large = itertools.product((16, 128, 4096), (7, 8192, 10**6), (-1, 0, 1))
    cases += [(k * size + rest, size) for size, k, rest in large]
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


def check_append(impl: Callable[..., None]) -> int:
    """Every small table and length, in a pool with room and in one without; then a long table."""
    cases = [
        (held, tokens, block_size, spare)
        for block_size in (4, 1, 2, 3, 16)
        for held in range(4)
        for tokens in range(5 * block_size + 2)
        for spare in (6, 0, 1, 2)
    ]
    cases += [(held, 131_072, 16, spare) for held in (0, 100) for spare in (8192, 8000)]
    for case in cases:
        _append_once(impl, *case)
    return len(cases)


class _Pool(BlockAllocator):
    """Says what is wrong with asking for less than nothing."""

    def allocate(self, count: int) -> list[int]:
        if count < 0:
            raise ValueError(f"allocate({count}): nothing is missing, so ask for nothing")
        return super().allocate(count)


def _append_once(impl: Callable[..., None], held: int, tokens: int, block_size: int, spare: int) -> None:
    # Somebody else has blocks too, ids fall, and one of the spare blocks is cached: it counts as free.
    other, name = 2, getattr(impl, "__name__", "append")
    pool = _Pool(other + held + spare)
    pool.free.reverse()
    others, table = pool.allocate(other), pool.allocate(held)
    for block in pool.allocate(min(spare, 1)):
        pool.register(block, b"cached")
        pool.release([block])
    generations = list(pool.generations)
    before, full, rest = list(table), *divmod(tokens, block_size)
    need = full + (rest > 0)
    missing = max(0, need - held)
    free = f"{spare} free block(s){', 1 of them cached' if spare else ''}"
    steps = Steps(f"table = {compact(table)}, room for {held * block_size} tokens; {free}")
    text = f"{name}(table, tokens={tokens}, block_size={block_size}, allocator=pool)"
    if missing > spare:
        steps.do(text, impl, table, tokens, block_size, pool, raises=OutOfBlocks)
        steps.expect(table == before, "too few are free, so the table stays as it was", before, table)
        why = "too few are free, so nothing may be taken: ask for all the missing blocks in one call"
        steps.expect(pool.num_free == spare, why, f"{spare} free blocks", f"{pool.num_free} free blocks")
        undone = [block for block, count in enumerate(pool.generations) if count != generations[block]]
        why = "giving them back is too late, what was cached is lost: ask for all the missing blocks in one call"
        steps.expect(not undone, why, "no block taken", f"blocks {undone} taken and given back")
        return
    got = steps.do(text, impl, table, tokens, block_size, pool)
    why = "the table is changed in place (`table.extend`, `table.append`), and nothing is returned"
    steps.expect(got is None, why, "nothing")
    want = f"a table of {max(need, held)} block(s) that starts with {before}"
    steps.expect(
        table[:held] == before, "the blocks that are there hold tokens: keep them, in order", want, table
    )
    if held >= need:
        why = f"{tokens} token(s) take {need} block(s), and {held} are there: nothing to do"
    else:
        why = f"{tokens} token(s) take {need} block(s), and {held} are there: {missing} more"
        if len(table) == held and pool.num_free < spare:
            why += "; change `table` in place: `table = …` makes a new list that the caller never sees"
    ids = all(type(block) is int for block in table)
    steps.expect(ids, "a table holds block ids, ints", want, table)
    steps.expect(len(table) == max(need, held), why, want, table)
    why = "take the new blocks from the allocator, at the end of the table, and none beside them"
    taken = set(table[held:])
    steps.expect(
        pool.num_free == spare - missing, why, f"{spare - missing} free blocks left", f"{pool.num_free} free"
    )
    steps.expect(len(taken) == missing and all(pool.refs[b] == 1 for b in taken), why, want, table)
    steps.expect(not taken & {*before, *others}, "those blocks belong to somebody", want, table)


def check_prefix_hashes(impl: Callable[[Sequence[int], int], list[bytes]]) -> int:
    """Prompts of every length up to four blocks; then long ones, repeated blocks, and blocks of real size."""
    cases = [(list(range(11, 11 + n)), 4) for n in (5, 9, 4, 8, 3, 1)]
    mixed = [100 + 37 * i % 101 for i in range(30)]
    cases += [(mixed[:n], size) for size in (1, 2, 3, 4, 5) for n in range(1, 5 * size + 3)]
    cases += [([7] * n, size) for size in (2, 4) for n in (9, 16, 17)]
    cases += [(list(range(5, 5 + n)), 16) for n in (15, 16, 17, 32, 33, 400, 512, 512, 5000)]  # one twice
    cases += [([first] * 4 + [9] * 4 + [5], 4) for first in (1, 2)]  # the same second block
    cases += [(list(range(70_000, 70_040)), 8), ([2**31 + 5] * 9, 4)]
    for tokens, size in cases:
        blocks = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        chain: list[bytes] = []
        for block in blocks:
            chain.append(hash_block(chain[-1] if chain else b"", block))
        usable = (len(tokens) - 1) // size
        names = {hash_block(b"", block): f"block {i} alone" for i, block in enumerate(blocks)}
        names |= {digest: _chain_name(i) for i, digest in enumerate(chain)}

        def named(hashes: Sequence[object], names: dict[bytes, str] = names) -> list[object]:
            return [names.get(h, "another hash") if isinstance(h, bytes) else h for h in hashes]

        got = call(impl, tokens=tokens, block_size=size)
        want = named(chain[:usable])
        expect(isinstance(got, list), "return a list of hashes", want)
        shown = named(got)
        expect(all(isinstance(h, bytes) for h in got), "keep what `hash_block` returns, bytes", want, shown)
        expect(len(got) <= usable, _why_too_many(len(tokens), size), want, shown)
        expect(
            len(got) == usable,
            f"{len(tokens)} tokens: {usable} full block(s) of {size} come before the last token",
            want,
            shown,
        )
        why = 'hash each block with the hash of the block before it as `parent`, and the first with b""'
        expect(got == chain[:usable], why, want, shown)
    return len(cases)


def _chain_name(number: int) -> str:
    return (
        "block 0"
        if number == 0
        else f"block {number} after {'block 0' if number == 1 else f'0…{number - 1}'}"
    )


def _why_too_many(tokens: int, size: int) -> str:
    if tokens % size:
        return f"the last block is not full ({tokens % size} of {size}), and only full blocks are shared"
    fit = f"{tokens} tokens are exactly {tokens // size} block(s)"
    return f"{fit}: the last token must still be computed, so its block is not taken"


def check_allocate(impl: Callable[..., list[int]]) -> int:
    """Walks that take and give back, with and without cached blocks; see `pool_walk`."""
    cached = [("allocate", 3), ("register", 0), ("release", 0)]
    told: list[tuple[int, list[Operation]]] = [
        (4, [("allocate", 2)]),
        (4, [("allocate", 4), ("allocate", 1)]),
        (4, [("allocate", 0), ("allocate", 3), ("allocate", 2), ("allocate", 1)]),
        (4, [("allocate", 2), ("release", 0), ("allocate", 4)]),
        (4, [*cached, ("allocate", 1)]),
        (4, [*cached, ("allocate", 2)]),
        (3, [*cached, ("allocate", 3)]),
        (3, [*cached, ("allocate", 4)]),
        (40, [("allocate", 30), ("release", 0), ("allocate", 35)]),
    ]
    return check_walks(
        "allocate", impl, told, "allocate allocate allocate release release register match fork copy"
    )


def check_fork(impl: Callable[..., list[int]]) -> int:
    """Walks with forks of forks and of nothing, and blocks without an owner."""
    told: list[tuple[int, list[Operation]]] = [
        (4, [("allocate", 2), ("fork", 0)]),
        (4, [("allocate", 2), ("fork", 0), ("fork", 1), ("release", 0)]),
        (4, [("allocate", 0), ("fork", 0)]),
        (4, [("misuse", 1)]),
        (4, [("allocate", 1), ("misuse", 3)]),
        (4, [("allocate", 2), ("register", 0), ("release", 0), ("misuse", 0)]),
        (20, [("allocate", 18), ("fork", 0)]),
        (4, [("allocate", 1), *[("fork", 0)] * 9]),
    ]
    return check_walks("fork", impl, told, "allocate fork fork fork release copy register match misuse")


def check_copy_on_write(impl: Callable[..., int]) -> int:
    """Walks in which shared blocks are written, also with an empty pool and with cached blocks only."""
    told: list[tuple[int, list[Operation]]] = [
        (4, [("allocate", 2), ("fork", 0), ("copy", 1, 1)]),
        (4, [("allocate", 1), ("copy", 0, 0)]),
        (2, [("allocate", 2), ("fork", 0), ("copy", 1, 1)]),
        (4, [("allocate", 1), ("fork", 0), ("copy", 0, 0), ("copy", 1, 0)]),
        (4, [("misuse", 2)]),
        (3, [("allocate", 1), ("fork", 0), ("allocate", 2), ("register", 2), ("release", 2), ("copy", 0, 0)]),
        (10, [("allocate", 1), *[("fork", 0)] * 9, *[("copy", owner, 0) for owner in range(9)]]),
    ]
    return check_walks(
        "copy_on_write", impl, told, "allocate allocate fork fork copy copy copy release register misuse"
    )


def check_match(impl: Callable[..., list[int]]) -> int:
    """Walks in which prefixes are registered, released, found again, and evicted."""
    held = [("allocate", 3), ("register", 0)]
    told: list[tuple[int, list[Operation]]] = [
        (5, [*held, ("match", 0, 2)]),
        (5, [*held, ("match", 0, 5)]),
        (5, [*held, ("match", 0, 3, 1)]),
        (5, [*held, ("release", 0), ("match", 0, 2)]),
        (3, [*held, ("release", 0), ("match", 0, 1), ("release", 0), ("allocate", 1), ("match", 0, 3)]),
        (5, [("allocate", 1), ("match", 0, 2), ("match", 0, 0)]),
        (9, [("allocate", 7), ("register", 0), ("match", 0, 6), ("release", 0), ("match", 0, 9)]),
    ]
    return check_walks(
        "match", impl, told, "allocate allocate register register match match match release release fork"
    )


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
    Exercise(
        name="kv.allocate",
        notebook="02",
        reference=BlockAllocator.allocate,
        check=check_allocate,
        hints=(
            "All or nothing: first find out whether there are enough, and only then take. If there are not, "
            "nothing may have changed when `OutOfBlocks` is raised.",
            "`self.num_free` counts what can be had. Take `count` times: from `self.free` while there is any, "
            "else `self.evict()`, which gives up the oldest cached block and returns its id. Each block taken "
            "then has one owner (`self.refs`) and a new generation (`self.generations`).",
            "`if count > self.num_free: raise OutOfBlocks(...)`; then `taken = [self.free.popleft() if self.free "
            "else self.evict() for _ in range(count)]`; for each: `self.refs[block] = 1`, "
            "`self.generations[block] += 1`; return `taken`.",
        ),
        plug=plug_piece("allocator", "allocate"),
    ),
    Exercise(
        name="kv.append",
        notebook="02",
        reference=grow_table,
        check=check_append,
        hints=(
            "How many blocks do so many tokens take, and how many are there? Most of the time the answer is "
            "that nothing is missing: the last block still has room.",
            "`blocks_for(tokens, block_size)` less `len(table)` is what is missing; it may be negative. Ask the "
            "allocator once, for all of it: if it raises, the table must be untouched.",
            "`missing = blocks_for(tokens, block_size) - len(table)`; `if missing > 0: "
            "table.extend(allocator.allocate(missing))`.",
        ),
        plug=plug_piece("block_manager", "grow_table", static=True),
    ),
    Exercise(
        name="kv.fork",
        notebook="02",
        reference=BlockAllocator.fork,
        check=check_fork,
        hints=(
            "No data moves. The new owner gets a table of its own with the same ids, and each block must know "
            "that it has one more owner.",
            'Refuse first, change afterwards: `self.require_used(block, "fork")` raises for a block without '
            "owner; call it for all blocks before you count the first one up.",
            'One loop with `self.require_used(block, "fork")`, one with `self.refs[block] += 1`, then '
            "`return list(blocks)`.",
        ),
        plug=plug_piece("allocator", "fork"),
    ),
    Exercise(
        name="kv.copy_on_write",
        notebook="02",
        reference=BlockAllocator.copy_on_write,
        check=check_copy_on_write,
        hints=(
            "The writer leaves the shared block to the others and gets a fresh one. Only a block with several "
            "owners is ever copied.",
            "The order counts: if there is no fresh block, `allocate` raises `OutOfBlocks`, and then the shared "
            "block must still have all of its owners.",
            "`if not self.is_shared(block): raise ValueError(...)`; `(fresh,) = self.allocate(1)`; "
            "`self.refs[block] -= 1`; `self.copies += 1`; return `fresh`.",
        ),
        plug=plug_piece("allocator", "copy_on_write"),
    ),
    Exercise(
        name="kv.prefix_hashes",
        notebook="02",
        reference=prefix_hashes,
        check=check_prefix_hashes,
        hints=(
            "Only full blocks can be shared, and at least one token of the prompt must be left to compute.",
            "`(len(tokens) - 1) // block_size` blocks can be taken. Walk through them; each hash takes the one "
            'before it as its parent, the first takes `b""`.',
            "For each `number` in that range: `block = tokens[number * block_size : (number + 1) * block_size]`, "
            '`hashes.append(hash_block(hashes[-1] if hashes else b"", block))`.',
        ),
        plug=plug_piece("block_manager", "prefix_hashes", static=True),
    ),
    Exercise(
        name="kv.match",
        notebook="02",
        reference=BlockAllocator.match,
        check=check_match,
        hints=(
            "Walk along the chain while the cache knows the hash. The first that it doesn't know ends the walk: "
            "what comes after belongs to another prefix.",
            "`self.block_of.get(content)` is the block, or None. A block that nobody holds waits in "
            "`self.evictable`, and must not be evicted from now on: take it out. Then it has an owner more.",
            "In the loop: `block = self.block_of.get(content)`; `if block is None: break`; `if self.refs[block] "
            "== 0: del self.evictable[block]`; `self.refs[block] += 1`; append. After it: `self.hits += "
            "len(taken)`.",
        ),
        plug=plug_piece("allocator", "match"),
    ),
)
