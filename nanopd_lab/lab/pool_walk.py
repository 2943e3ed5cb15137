"""Walks of operations through a block pool, each step compared with a plain model; the shortest failure is told.

The pool is a `BlockAllocator` in which one method is a learner's. The model keeps the same facts in the
plainest way and follows the learner wherever there is a choice, such as which of several free blocks to take.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nanopd_lab.errors import OutOfBlocks
from nanopd_lab.kv.allocator import BlockAllocator
from nanopd_lab.lab.checking import Counterexample, Steps
from nanopd_lab.lab.pieces import with_piece

# ("allocate", count), ("fork", owner), ("copy", owner, position), ("release", owner), ("register", owner),
# ("match", text, length[, position of a hash that nobody knows]), ("misuse", block). An owner is an index into
# the tables there are, modulo their number.
Operation = tuple[Any, ...]


@dataclass
class Owner:
    """A block table, and the text whose blocks it holds."""

    table: list[int]
    text: str


def content(text: str, position: int) -> bytes:
    """Stands for the hash of a block and all before it."""
    return f"{text}{position}".encode()


class Walk:
    """One pool with `method` replaced by `impl`, driven operation by operation.

    Raises:
        Counterexample: from `run`, at the first operation that gives or leaves anything wrong
    """

    def __init__(self, method: str, impl: Any, num_blocks: int) -> None:
        self.method, self.name = method, getattr(impl, "__name__", method)
        self.pool = with_piece(BlockAllocator, method, impl)(num_blocks)
        self.steps = Steps(f"pool = BlockAllocator({num_blocks})")
        self.calls = 0  # of the learner's method
        self.owners: list[Owner] = []
        self.texts = 0
        self.free = set(range(num_blocks))
        self.refs, self.generations = [0] * num_blocks, [0] * num_blocks
        self.contents: list[bytes | None] = [None] * num_blocks
        self.released: list[int] = []  # registered and without owner, oldest first
        self.hits = self.copies = self.evictions = 0

    def run(self, operations: Iterable[Operation]) -> int:
        """Do them all; returns how often the learner's method was called."""
        for verb, *numbers in operations:
            if verb in ("allocate", "match", "misuse"):
                getattr(self, f"_{verb}")(*numbers)
            elif self.owners:
                owner = self.owners[numbers[0] % len(self.owners)]
                getattr(self, f"_{verb}")(owner, *numbers[1:])
        return self.calls

    def _do(self, method: str, *args: Any, raises: type[Exception] | None = None, possible: str = "") -> Any:
        shown = ", ".join(map(repr, args))
        mine = method == self.method
        self.calls += mine
        text = f"{self.name}(pool, {shown})" if mine else f"pool.{method}({shown})"
        got = self.steps.do(text, getattr(self.pool, method), *args, raises=raises, possible=possible)
        if raises:
            self._compare(f"it raised {raises.__name__} and must change nothing")
        return got

    # ------------------------------------------------------------------ operations

    def _allocate(self, count: int) -> None:
        room = len(self.free) + len(self.released)
        if count > room:
            self._do("allocate", count, raises=OutOfBlocks)
            return
        taken = self._do("allocate", count, possible=self._room())
        self._took(taken, count)
        self._compare(f"{count} block(s) are taken")
        self._own(taken, self._next_text())

    def _own(self, table: list[int], text: str) -> None:
        """One more owner, who keeps the very list that came back, as a sequence does."""
        why = "that is another owner's own list: when one table grows, the other would too; return a new one"
        shared = any(table is owner.table for owner in self.owners)
        self.steps.expect(not shared, why, "a list of its own", "the very list that another owner has")
        self.owners.append(Owner(table, text))

    def _took(self, taken: Any, count: int) -> None:
        """Check what `allocate` returned, and follow it."""
        want = f"a list of {count} block id(s)"
        self.steps.expect(isinstance(taken, list), "return a list of block ids", want)
        self.steps.expect(
            len(taken) == count, f"{count} block(s) were asked for, {len(taken)} came back", want
        )
        legal = all(type(block) is int and 0 <= block < len(self.refs) for block in taken)
        self.steps.expect(legal, f"block ids are ints from 0 to {len(self.refs) - 1}", want)
        self.steps.expect(len(set(taken)) == count, "the same block was handed out twice in one call", want)
        for block in taken:
            used = f"block {block} already has {self.refs[block]} owner(s), who would be overwritten"
            self.steps.expect(self.refs[block] == 0, used, want)
        evicted = self.released[: max(0, count - len(self.free))]
        for block in taken:
            why = (
                f"block {block} is cached and not the next to be evicted: free blocks {sorted(self.free)} go "
            )
            why += f"first, then the cached ones in the order of their release, {self.released}"
            self.steps.expect(block in self.free or block in evicted, why, want)
        self.evictions += sum(block not in self.free for block in taken)
        for block in taken:
            self.free.discard(block)
            self.contents[block] = None
            self.refs[block] = 1
            self.generations[block] += 1
        self.released = [block for block in self.released if block not in taken]

    def _fork(self, owner: Owner) -> None:
        before = list(owner.table)
        child = self._do("fork", owner.table)
        why = "the parent's table must stay as it is"
        self.steps.expect(owner.table == before, why, before, f"blocks = {owner.table} afterwards")
        self.steps.expect(child == before and isinstance(child, list), "a list of the same blocks", before)
        for block in before:
            self.refs[block] += 1
        self._compare("each block has one owner more")
        self._own(child, owner.text)

    def _copy(self, owner: Owner, position: int) -> None:
        if not owner.table:
            return
        position %= len(owner.table)
        block = owner.table[position]
        if self.refs[block] < 2:
            self._do("copy_on_write", block, raises=ValueError)
        elif not self.free and not self.released:
            self._do("copy_on_write", block, raises=OutOfBlocks)
        else:
            possible = f"block {block} has {self.refs[block]} owners; {self._room()}"
            fresh = self._do("copy_on_write", block, possible=possible)
            why = f"block {block} still has other owners, so the writer needs another block"
            self.steps.expect(fresh != block, why, "a fresh block")
            self.steps.expect(type(fresh) is int, "return one block id, an int", "a fresh block")
            self._took([fresh], 1)
            self.refs[block] -= 1
            self.copies += 1
            self._compare(f"one owner of block {block} has moved to block {fresh}")
            owner.table[position] = fresh

    def _release(self, owner: Owner) -> None:
        self.owners.remove(owner)
        self._do("release", owner.table)
        for block in reversed(owner.table):
            self.refs[block] -= 1
            if self.refs[block] == 0 and self.contents[block] is None:
                self.free.add(block)
            elif self.refs[block] == 0:
                self.released.append(block)
        self._compare("each block has one owner less")

    def _register(self, owner: Owner) -> None:
        for position, block in enumerate(owner.table):
            name = content(owner.text, position)
            self._do("register", block, name)
            if self.contents[block] is None and name not in self.contents:
                self.contents[block] = name

    def _match(self, text: int, length: int, gap: int = 99) -> None:
        text_name = chr(ord("a") + text % max(1, self.texts))
        hashes = [content(text_name, position) for position in range(length)]
        if gap < length:
            hashes[gap] = b"unknown"
        want = []
        for name in hashes:
            if name not in self.contents:
                break
            want.append(self.contents.index(name))
        before = list(hashes)
        got = self._do("match", hashes)
        self.steps.expect(
            hashes == before, "the caller still needs the list of hashes: don't change it", before
        )
        why = "one block for each leading hash that is in `block_of`, in order, up to the first that is not"
        self.steps.expect(isinstance(got, list) and got == want, why, want)
        for block in want:
            self.refs[block] += 1
            if block in self.released:
                self.released.remove(block)
        self.hits += len(want)
        self._compare("each block found has one owner more")
        self._own(got, text_name)

    def _misuse(self, block: int) -> None:
        """Nobody may fork, copy or release a block that has no owner."""
        block %= len(self.refs)
        if self.refs[block] == 0:
            method = self.method if self.method in ("fork", "copy_on_write") else "release"
            self._do(method, block if method == "copy_on_write" else [block], raises=ValueError)
            mixed = [next((o.table[0] for o in self.owners if o.table), block), block]
            if method == "fork":
                self._do("fork", mixed, raises=ValueError)

    def _room(self) -> str:
        cached = f" and cached ones without an owner, {self.released}" if self.released else ""
        return f"there are free blocks, {sorted(self.free)}{cached}"

    def _next_text(self) -> str:
        self.texts += 1
        return chr(ord("a") + self.texts - 1)

    # ------------------------------------------------------------------ the state afterwards

    def _compare(self, done: str) -> None:
        """Everything in the pool against the model."""
        pool, expect = self.pool, self.steps.expect
        for name, want, what in (
            ("refs", self.refs, "owner(s)"),
            ("generations", self.generations, "hand-out(s), counted by its generation"),
        ):
            got = list(getattr(pool, name))
            expect(len(got) == len(want), f"self.{name} has one entry a block", want, got)
            for block, (have, need) in enumerate(zip(got, want, strict=True)):
                expect(
                    have == need,
                    f"{done}, so block {block} has {need} {what}",
                    f"self.{name} = {want}",
                    f"self.{name} = {got}",
                )
        got, want = list(pool.free), sorted(self.free)
        expect(
            sorted(got) == want,
            f"{done}, so these blocks are free",
            f"self.free = {want}, in any order",
            f"self.free = {got}",
        )
        got = list(pool.evictable)
        why = "blocks with cached content and no owner, in the order of their release"
        expect(got == self.released, why, f"self.evictable = {self.released}", f"self.evictable = {got}")
        expect(
            pool.contents == self.contents,
            "the hash that each block is registered for",
            f"self.contents = {self.contents}",
            f"self.contents = {pool.contents}",
        )
        cached = {name: block for block, name in enumerate(self.contents) if name is not None}
        expect(
            pool.block_of == cached,
            "the block of each hash in the cache",
            f"self.block_of = {cached}",
            f"self.block_of = {pool.block_of}",
        )
        for name in ("hits", "copies", "evictions"):
            have, need = getattr(pool, name), getattr(self, name)
            expect(
                have == need,
                f"self.{name} counts them for the statistics",
                f"self.{name} = {need}",
                f"self.{name} = {have}",
            )


def check_walks(method: str, impl: Any, scenarios: Sequence[tuple[int, list[Operation]]], verbs: str) -> int:
    """Told scenarios `(num_blocks, operations)` first, then random walks of growing length.

    Args:
        verbs: the operations of the random walks, one word each, the more often the likelier

    Raises:
        Counterexample: of a failing walk, everything taken out that is not needed for it to fail
    """
    rng, words, calls = random.Random(method), verbs.split(), 0
    walks = list(scenarios)
    for length in (2, 3, 4, 5, 6, 8, 12, 20, 40):
        walks += [(rng.randint(1, 7), [_draw(rng, words) for _ in range(length)]) for _ in range(40)]
    for num_blocks, operations in walks:
        try:
            calls += Walk(method, impl, num_blocks).run(operations)
        except Counterexample as found:
            raise _shortest(method, impl, num_blocks, operations, found) from None
    return calls


def _draw(rng: random.Random, words: Sequence[str]) -> Operation:
    verb = rng.choice(words)
    if verb == "allocate":
        return verb, rng.choice((0, 1, 1, 2, 2, 3, 5))
    numbers = rng.randrange(8), rng.randrange(5), rng.randrange(6)
    return verb, *numbers[: {"copy": 2, "match": 3}.get(verb, 1)]


def _shortest(
    method: str, impl: Any, num_blocks: int, operations: list[Operation], found: Counterexample
) -> Counterexample:
    if found.got.startswith("no answer"):  # each try would take as long
        return found
    position = 0
    while position < len(operations):
        fewer = operations[:position] + operations[position + 1 :]
        try:
            Walk(method, impl, num_blocks).run(fewer)
        except Counterexample as smaller:
            if not smaller.got.startswith("no answer"):
                operations, found, position = fewer, smaller, 0
                continue
        position += 1
    return found
