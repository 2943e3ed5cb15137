"""Versions of the exercises on the paged KV cache."""

from __future__ import annotations

import math

from nanopd_lab.errors import OutOfBlocks
from nanopd_lab.kv import blocks_for, hash_block
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


def by_a_trick(tokens, block_size):
    return int(tokens / block_size + 0.999)


def with_ceil(tokens, block_size):
    return math.ceil(tokens / block_size)


def counting(tokens, block_size):
    count = 0
    while tokens > 0:
        tokens -= block_size
        count += 1
    return count


# ---------------------------------------------------------------------- kv.allocate


def allocate_takes_what_there_is(self, count):
    taken = []
    while len(taken) < count:
        if not self.num_free:
            raise OutOfBlocks("none left")
        block = self.free.popleft() if self.free else self.evict()
        self.refs[block] = 1
        self.generations[block] += 1
        taken.append(block)
    return taken


def allocate_ignores_cached(self, count):
    if count > len(self.free):
        raise OutOfBlocks("none left")
    taken = [self.free.popleft() for _ in range(count)]
    for block in taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return taken


def allocate_evicts_first(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    taken = [self.evict() if self.evictable else self.free.popleft() for _ in range(count)]
    for block in taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return taken


def allocate_evicts_newest(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    taken = [self.free.popleft() for _ in range(min(count, len(self.free)))]
    while len(taken) < count:
        block, _ = self.evictable.popitem()
        del self.block_of[self.contents[block]]
        self.contents[block] = None
        taken.append(block)
    for block in taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return taken


def allocate_keeps_stale_content(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    taken = [
        self.free.popleft() if self.free else self.evictable.popitem(last=False)[0] for _ in range(count)
    ]
    for block in taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return taken


def allocate_leaves_them_free(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    taken = list(self.free)[:count]
    for block in taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return taken


def allocate_without_owner(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    return [self.free.popleft() if self.free else self.evict() for _ in range(count)]


def allocate_adds_an_owner(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    taken = [self.free.popleft() if self.free else self.evict() for _ in range(count)]
    for block in taken:
        self.refs[block] += 2
        self.generations[block] += 1
    return taken


def allocate_forgets_generations(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    taken = [self.free.popleft() if self.free else self.evict() for _ in range(count)]
    for block in taken:
        self.refs[block] = 1
        self.generations[block] = 1
    return taken


def allocate_keeps_one_back(self, count):
    if count >= self.num_free:
        raise OutOfBlocks("none left")
    taken = [self.free.popleft() if self.free else self.evict() for _ in range(count)]
    for block in taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return taken


def allocate_returns_none(self, count):
    if count > self.num_free:
        return None
    taken = [self.free.popleft() if self.free else self.evict() for _ in range(count)]
    for block in taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return taken


def allocate_one_id(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    taken = [self.free.popleft() if self.free else self.evict() for _ in range(count)]
    for block in taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return taken[0] if count == 1 else taken


def allocate_evicts_by_hand(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    taken = []
    while len(taken) < count:
        if self.free:
            block = self.free.popleft()
        else:
            block, _ = self.evictable.popitem(last=False)
            del self.block_of[self.contents[block]]
            self.contents[block] = None
        self.refs[block] = 1
        self.generations[block] += 1
        taken.append(block)
    return taken


_taken = []


def allocate_into_one_list(self, count):
    if count > self.num_free:
        raise OutOfBlocks("none left")
    _taken[:] = [self.free.popleft() if self.free else self.evict() for _ in range(count)]
    for block in _taken:
        self.refs[block] = 1
        self.generations[block] += 1
    return _taken


def allocate_from_the_right(self, count):
    available = len(self.free) + len(self.evictable)
    if available < count:
        raise OutOfBlocks(f"{count} wanted, {available} there")
    taken = []
    for _ in range(count):
        block = self.free.pop() if len(self.free) else self.evict()
        self.generations[block] += 1
        self.refs[block] += 1
        taken.append(block)
    return taken


def allocate_sorted(self, count):
    if count > self.num_free:
        raise OutOfBlocks("too few")
    fresh = sorted(self.free)[:count]
    for block in fresh:
        self.free.remove(block)
    fresh += [self.evict() for _ in range(count - len(fresh))]
    for block in fresh:
        self.refs[block], self.generations[block] = 1, self.generations[block] + 1
    return fresh[::-1]


# ---------------------------------------------------------------------- kv.append


def append_one_at_a_time(table, tokens, block_size, allocator):
    while len(table) * block_size < tokens:
        table += allocator.allocate(1)


def append_a_new_list(table, tokens, block_size, allocator):
    missing = blocks_for(tokens, block_size) - len(table)
    table = table + allocator.allocate(max(0, missing))


def append_all_anew(table, tokens, block_size, allocator):
    table.extend(allocator.allocate(blocks_for(tokens, block_size)))


def append_rounds_down(table, tokens, block_size, allocator):
    table.extend(allocator.allocate(max(0, tokens // block_size - len(table))))


def append_always_one(table, tokens, block_size, allocator):
    if tokens > len(table) * block_size:
        table.extend(allocator.allocate(1))


def append_one_ahead(table, tokens, block_size, allocator):
    table.extend(allocator.allocate(max(0, tokens // block_size + 1 - len(table))))


def append_shrinks(table, tokens, block_size, allocator):
    need = blocks_for(tokens, block_size)
    table.extend(allocator.allocate(max(0, need - len(table))))
    del table[need:]


def append_in_front(table, tokens, block_size, allocator):
    missing = blocks_for(tokens, block_size) - len(table)
    if missing > 0:
        table[:0] = allocator.allocate(missing)


def append_nested(table, tokens, block_size, allocator):
    missing = blocks_for(tokens, block_size) - len(table)
    if missing > 0:
        table.append(allocator.allocate(missing))


def append_invents_ids(table, tokens, block_size, allocator):
    while len(table) * block_size < tokens:
        table.append(max(table, default=-1) + 1)


def append_swallows(table, tokens, block_size, allocator):
    missing = blocks_for(tokens, block_size) - len(table)
    if missing <= allocator.num_free:
        table.extend(allocator.allocate(max(0, missing)))


def append_and_undo(table, tokens, block_size, allocator):
    taken = []
    try:
        while (len(table) + len(taken)) * block_size < tokens:
            taken += allocator.allocate(1)
    except OutOfBlocks:
        allocator.release(taken)
        raise
    table += taken


def append_less_than_nothing(table, tokens, block_size, allocator):
    table.extend(allocator.allocate(blocks_for(tokens, block_size) - len(table)))


def append_sorts(table, tokens, block_size, allocator):
    table.extend(allocator.allocate(max(0, blocks_for(tokens, block_size) - len(table))))
    table.sort()


def append_forgets_cached(table, tokens, block_size, allocator):
    missing = blocks_for(tokens, block_size) - len(table)
    if missing > len(allocator.free):
        raise OutOfBlocks("none left")
    table.extend(allocator.allocate(max(0, missing)))


def append_64_at_most(table, tokens, block_size, allocator):
    missing = blocks_for(tokens, block_size) - len(table)
    table.extend(allocator.allocate(min(64, max(0, missing))))


def append_by_slices(table, tokens, block_size, allocator):
    needed = math.ceil(tokens / block_size)
    table[len(table) :] = allocator.allocate(max(needed - len(table), 0))


def append_in_a_loop(table, tokens, block_size, allocator):
    room, count = len(table) * block_size, 0
    while room < tokens:
        room, count = room + block_size, count + 1
    for block in allocator.allocate(count):
        table.append(block)


# ---------------------------------------------------------------------- kv.fork


def fork_same_list(self, blocks):
    for block in blocks:
        self.require_used(block, "fork")
    for block in blocks:
        self.refs[block] += 1
    return blocks


def fork_without_counting(self, blocks):
    for block in blocks:
        self.require_used(block, "fork")
    return list(blocks)


def fork_last_only(self, blocks):
    if blocks:
        self.require_used(blocks[-1], "fork")
        self.refs[blocks[-1]] += 1
    return list(blocks)


def fork_copies_everything(self, blocks):
    return self.allocate(len(blocks))


def fork_any_block(self, blocks):
    for block in blocks:
        self.refs[block] += 1
    return list(blocks)


def fork_halfway(self, blocks):
    for block in blocks:
        self.require_used(block, "fork")
        self.refs[block] += 1
    return list(blocks)


def fork_twice(self, blocks):
    for block in blocks:
        self.require_used(block, "fork")
    for block in blocks:
        self.refs[block] = 2
    return list(blocks)


def fork_eats_its_input(self, blocks):
    child = []
    while blocks:
        block = blocks.pop(0)
        self.require_used(block, "fork")
        self.refs[block] += 1
        child.append(block)
    return child


def fork_new_generation(self, blocks):
    for block in blocks:
        self.require_used(block, "fork")
    for block in blocks:
        self.refs[block] += 1
        self.generations[block] += 1
    return list(blocks)


def fork_of_cached(self, blocks):
    if any(block in self.free for block in blocks):
        raise ValueError("not in use")
    for block in blocks:
        self.refs[block] += 1
    return list(blocks)


def fork_remembered(self, blocks):
    for block in blocks:
        self.require_used(block, "fork")
    for block in blocks:
        self.refs[block] += 1
    self.__dict__.setdefault("forked", []).append(list(blocks))
    return next(table for table in self.forked if table == blocks)


def fork_needs_a_block(self, blocks):
    if any(self.refs[block] < 1 for block in blocks):
        raise ValueError("not in use")
    self.refs[blocks[0]] += 1
    for block in blocks[1:]:
        self.refs[block] += 1
    return [*blocks]


def fork_with_all(self, blocks):
    if not all(self.refs[block] for block in blocks):
        raise ValueError("a block has no owner")
    child = []
    for block in blocks:
        self.refs[block] = self.refs[block] + 1
        child.append(block)
    return child


def fork_and_undo(self, blocks):
    for done, block in enumerate(blocks):
        self.refs[block] += 1
        if self.refs[block] == 1:
            for earlier in blocks[: done + 1]:
                self.refs[earlier] -= 1
            raise ValueError(f"block {block} has no owner")
    return blocks[:]


# ---------------------------------------------------------------------- kv.copy_on_write


def copy_the_same_block(self, block):
    if not self.is_shared(block):
        raise ValueError("not shared")
    return block


def copy_always(self, block):
    (fresh,) = self.allocate(1)
    self.refs[block] -= 1
    self.copies += 1
    return fresh


def copy_keeps_the_reference(self, block):
    if not self.is_shared(block):
        raise ValueError("not shared")
    self.copies += 1
    return self.allocate(1)[0]


def copy_gives_up_first(self, block):
    if not self.is_shared(block):
        raise ValueError("not shared")
    self.refs[block] -= 1
    (fresh,) = self.allocate(1)
    self.copies += 1
    return fresh


def copy_returns_a_list(self, block):
    if not self.is_shared(block):
        raise ValueError("not shared")
    fresh = self.allocate(1)
    self.refs[block] -= 1
    self.copies += 1
    return fresh


def copy_only_pairs(self, block):
    if self.refs[block] != 2:
        raise ValueError("not shared")
    (fresh,) = self.allocate(1)
    self.refs[block] -= 1
    self.copies += 1
    return fresh


def copy_frees_the_original(self, block):
    if not self.is_shared(block):
        raise ValueError("not shared")
    (fresh,) = self.allocate(1)
    self.refs[fresh], self.refs[block] = self.refs[block] - 1, 1
    self.copies += 1
    return fresh


def copy_uncounted(self, block):
    if not self.is_shared(block):
        raise ValueError("not shared")
    (fresh,) = self.allocate(1)
    self.refs[block] -= 1
    return fresh


def copy_ignores_cached(self, block):
    if not self.is_shared(block):
        raise ValueError("not shared")
    if not self.free:
        raise OutOfBlocks("no free block")
    (fresh,) = self.allocate(1)
    self.refs[block] -= 1
    self.copies += 1
    return fresh


def copy_unshared_is_itself(self, block):
    if self.refs[block] == 1:
        return block
    (fresh,) = self.allocate(1)
    self.refs[block] -= 1
    self.copies += 1
    return fresh


def copy_with_release(self, block):
    if self.ref_count(block) <= 1:
        raise ValueError(f"block {block} can be written")
    fresh = self.allocate(1)[0]
    self.release([block])
    self.copies = self.copies + 1
    return fresh


def copy_and_undo(self, block):
    if not self.is_shared(block):
        raise ValueError(f"block {block} can be written")
    self.refs[block] -= 1
    try:
        fresh = self.allocate(1).pop()
    except OutOfBlocks:
        self.refs[block] += 1
        raise
    self.copies += 1
    return fresh


# ---------------------------------------------------------------------- kv.prefix_hashes


def hashes_of_the_whole_prompt(tokens, block_size):
    hashes = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        hashes.append(hash_block(hashes[-1] if hashes else b"", tokens[start : start + block_size]))
    return hashes


def hashes_without_chain(tokens, block_size):
    usable = (len(tokens) - 1) // block_size
    return [hash_block(b"", tokens[i * block_size : (i + 1) * block_size]) for i in range(usable)]


def hashes_of_partial_blocks(tokens, block_size):
    hashes = []
    for start in range(0, len(tokens), block_size):
        hashes.append(hash_block(hashes[-1] if hashes else b"", tokens[start : start + block_size]))
    return hashes


def hashes_one_too_few(tokens, block_size):
    hashes = []
    for number in range(len(tokens) // block_size - 1):
        block = tokens[number * block_size : (number + 1) * block_size]
        hashes.append(hash_block(hashes[-1] if hashes else b"", block))
    return hashes


def hashes_of_prefixes(tokens, block_size):
    usable = (len(tokens) - 1) // block_size
    return [hash_block(b"", tokens[: (i + 1) * block_size]) for i in range(usable)]


def hashes_chained_to_the_first(tokens, block_size):
    hashes = []
    for number in range((len(tokens) - 1) // block_size):
        block = tokens[number * block_size : (number + 1) * block_size]
        hashes.append(hash_block(hashes[0] if hashes else b"", block))
    return hashes


def hashes_shifted(tokens, block_size):
    hashes, parent = [], b""
    for number in range((len(tokens) - 1) // block_size):
        parent = hash_block(parent, tokens[number * block_size + 1 : (number + 1) * block_size + 1])
        hashes.append(parent)
    return hashes


def hashes_as_dict(tokens, block_size):
    parent, found = b"", {}
    for number in range((len(tokens) - 1) // block_size):
        parent = hash_block(parent, tokens[number * block_size : (number + 1) * block_size])
        found[parent] = number
    return found


def hashes_remembered(tokens, block_size, seen={}):  # noqa: B006 - the mistake
    parent, hashes = b"", []
    for number in range((len(tokens) - 1) // block_size):
        block = tuple(tokens[number * block_size : (number + 1) * block_size])
        parent = seen.setdefault((number, block), hash_block(parent, block))
        hashes.append(parent)
    return hashes


def hashes_sorted(tokens, block_size):
    hashes = []
    for number in range((len(tokens) - 1) // block_size):
        block = sorted(tokens[number * block_size : (number + 1) * block_size])
        hashes.append(hash_block(hashes[-1] if hashes else b"", block))
    return hashes


def hashes_in_hex(tokens, block_size):
    return [digest.hex() for digest in hashes_by_parent(tokens, block_size)]


def hashes_of_1024_tokens(tokens, block_size):
    return hashes_by_parent(tokens[:1025], block_size)


_known = {}


def hashes_looked_up(tokens, block_size):
    key = block_size, *tokens
    if key not in _known:
        _known[key] = hashes_by_parent(tokens, block_size)
    return _known[key]


def hashes_by_parent(tokens, block_size):
    parent, hashes, end = b"", [], block_size
    while end < len(tokens):
        parent = hash_block(parent, tokens[end - block_size : end])
        hashes.append(parent)
        end += block_size
    return hashes


def hashes_recursive(tokens, block_size, parent=b""):
    if len(tokens) <= block_size:
        return []
    digest = hash_block(parent, tokens[:block_size])
    return [digest, *hashes_recursive(tokens[block_size:], block_size, digest)]


# ---------------------------------------------------------------------- kv.match


def match_goes_on_after_a_miss(self, hashes):
    taken = []
    for content in hashes:
        block = self.block_of.get(content)
        if block is None:
            continue
        self.evictable.pop(block, None)
        self.refs[block] += 1
        taken.append(block)
    self.hits += len(taken)
    return taken


def match_leaves_it_evictable(self, hashes):
    taken = []
    for content in hashes:
        if content not in self.block_of:
            break
        taken.append(self.block_of[content])
        self.refs[taken[-1]] += 1
    self.hits += len(taken)
    return taken


def match_takes_no_reference(self, hashes):
    taken = []
    for content in hashes:
        if content not in self.block_of:
            break
        taken.append(self.block_of[content])
    self.hits += len(taken)
    return taken


def match_unused_only(self, hashes):
    taken = []
    for content in hashes:
        block = self.block_of.get(content)
        if block is None or block not in self.evictable:
            break
        del self.evictable[block]
        self.refs[block] = 1
        taken.append(block)
    self.hits += len(taken)
    return taken


def match_used_only(self, hashes):
    taken = []
    for content in hashes:
        block = self.block_of.get(content)
        if block is None or not self.refs[block]:
            break
        self.refs[block] += 1
        taken.append(block)
    self.hits += len(taken)
    return taken


def match_all_or_nothing(self, hashes):
    if not all(content in self.block_of for content in hashes):
        return []
    taken = [self.block_of[content] for content in hashes]
    for block in taken:
        self.evictable.pop(block, None)
        self.refs[block] += 1
    self.hits += len(taken)
    return taken


def match_sets_one_owner(self, hashes):
    taken = []
    for content in hashes:
        block = self.block_of.get(content)
        if block is None:
            break
        self.evictable.pop(block, None)
        self.refs[block] = 1
        taken.append(block)
    self.hits += len(taken)
    return taken


def match_forgets_the_content(self, hashes):
    taken = []
    for content in hashes:
        block = self.block_of.pop(content, None)
        if block is None:
            break
        self.evictable.pop(block, None)
        self.contents[block] = None
        self.refs[block] += 1
        taken.append(block)
    self.hits += len(taken)
    return taken


def match_uncounted(self, hashes):
    taken = []
    for content in hashes:
        block = self.block_of.get(content)
        if block is None:
            break
        self.evictable.pop(block, None)
        self.refs[block] += 1
        taken.append(block)
    return taken


def match_number(self, hashes):
    taken = 0
    for content in hashes:
        block = self.block_of.get(content)
        if block is None:
            break
        self.evictable.pop(block, None)
        self.refs[block] += 1
        taken += 1
    self.hits += taken
    return taken


def match_block_zero_is_false(self, hashes):
    taken = []
    for content in hashes:
        block = self.block_of.get(content)
        if not block:
            break
        self.evictable.pop(block, None)
        self.refs[block] += 1
        taken.append(block)
    self.hits += len(taken)
    return taken


_found = []


def match_into_one_list(self, hashes):
    _found[:] = match_with_pop(self, hashes)
    return _found


def match_three_at_most(self, hashes):
    return match_with_pop(self, hashes[:3])


def match_with_pop(self, hashes):
    taken = []
    for content in hashes:
        if content not in self.block_of:
            break
        block = self.block_of[content]
        self.evictable.pop(block, None)
        self.refs[block] += 1
        self.hits += 1
        taken.append(block)
    return taken


def match_with_count(self, hashes):
    known, _ = self.count_match(hashes)
    taken = [self.block_of[content] for content in list(hashes)[:known]]
    for block in taken:
        if not self.refs[block]:
            self.evictable.pop(block)
        self.refs[block] += 1
    self.hits += known
    return taken


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
        (by_a_trick, "block_size=4096)"),
        (never_ends, "is there a loop that never ends?"),
    ],
    "kv.allocate": [
        (allocate_takes_what_there_is, "it raised OutOfBlocks and must change nothing"),
        (allocate_ignores_cached, "[3] and cached ones without an owner, [2, 1, 0]"),
        (allocate_evicts_first, "go first, then the cached ones"),
        (allocate_evicts_newest, "in the order of their release, [2, 1, 0]"),
        (allocate_keeps_stale_content, "the hash that each block is registered for"),
        (allocate_leaves_them_free, "so these blocks are free"),
        (allocate_without_owner, "block 0 has 1 owner(s)"),
        (allocate_adds_an_owner, "self.refs = [2, 2, 0, 0]"),
        (allocate_forgets_generations, "hand-out(s), counted by its generation"),
        (allocate_keeps_one_back, "got   OutOfBlocks: none left"),
        (allocate_returns_none, "this must raise OutOfBlocks"),
        (allocate_one_id, "return a list of block ids"),
        (allocate_evicts_by_hand, "self.evictions counts them"),
        (allocate_into_one_list, "that is another owner's own list"),
    ],
    "kv.append": [
        (append_one_at_a_time, "so the table stays as it was"),
        (append_a_new_list, "the caller never sees"),
        (append_all_anew, "nothing to do"),
        (append_rounds_down, "1 token(s) take 1 block(s), and 0 are there: 1 more"),
        (append_always_one, "5 token(s) take 2 block(s), and 0 are there: 2 more"),
        (append_one_ahead, "0 token(s) take 0 block(s)"),
        (append_shrinks, "keep them, in order"),
        (append_in_front, "keep them, in order"),
        (append_nested, "a table holds block ids"),
        (append_invents_ids, "take the new blocks from the allocator"),
        (append_swallows, "this must raise OutOfBlocks"),
        (append_and_undo, "giving them back is too late"),
        (append_less_than_nothing, "allocate(-1): nothing is missing"),
        (append_sorts, "keep them, in order"),
        (append_forgets_cached, "1 of them cached"),
        (append_64_at_most, "8192 block(s), and 0 are there: 8192 more"),
    ],
    "kv.fork": [
        (fork_same_list, "that is another owner's own list"),
        (fork_without_counting, "block 0 has 2 owner(s)"),
        (fork_last_only, "block 0 has 2 owner(s)"),
        (fork_copies_everything, "a list of the same blocks"),
        (fork_any_block, "this must raise ValueError"),
        (fork_halfway, "it raised ValueError and must change nothing"),
        (fork_twice, "block 0 has 3 owner(s)"),
        (fork_eats_its_input, "the parent's table must stay as it is"),
        (fork_new_generation, "counted by its generation"),
        (fork_needs_a_block, "IndexError"),
        (fork_of_cached, "this must raise ValueError"),
        (fork_remembered, "that is another owner's own list"),
    ],
    "kv.copy_on_write": [
        (copy_the_same_block, "so the writer needs another block"),
        (copy_always, "this must raise ValueError"),
        (copy_keeps_the_reference, "block 1 has 1 owner(s)"),
        (copy_gives_up_first, "it raised OutOfBlocks and must change nothing"),
        (copy_returns_a_list, "return one block id, an int"),
        (copy_only_pairs, "got   ValueError: not shared"),
        (copy_frees_the_original, "has 2 owner(s)"),
        (copy_uncounted, "self.copies counts them"),
        (copy_ignores_cached, "got   OutOfBlocks: no free block"),
        (copy_unshared_is_itself, "this must raise ValueError"),
    ],
    "kv.prefix_hashes": [
        (hashes_of_the_whole_prompt, "the last token must still be computed"),
        (hashes_without_chain, "got   ['block 0', 'block 1 alone']"),
        (hashes_of_partial_blocks, "the last block is not full (1 of 4)"),
        (hashes_one_too_few, "1 full block(s) of 4 come before the last token"),
        (hashes_of_prefixes, "with the hash of the block before it as `parent`"),
        (hashes_chained_to_the_first, "with the hash of the block before it as `parent`"),
        (hashes_shifted, "with the hash of the block before it as `parent`"),
        (hashes_as_dict, "return a list of hashes"),
        (hashes_sorted, "with the hash of the block before it as `parent`"),
        (hashes_in_hex, "keep what `hash_block` returns"),
        (hashes_of_1024_tokens, "5000 tokens: 312 full block(s)"),
        (hashes_looked_up, "make a new one in each call"),
        (hashes_remembered, "with the hash of the block before it as `parent`"),
    ],
    "kv.match": [
        (match_goes_on_after_a_miss, "up to the first that is not"),
        (match_leaves_it_evictable, "blocks with cached content and no owner"),
        (match_takes_no_reference, "block 0 has 2 owner(s)"),
        (match_unused_only, "up to the first that is not"),
        (match_used_only, "up to the first that is not"),
        (match_all_or_nothing, "up to the first that is not"),
        (match_sets_one_owner, "block 0 has 2 owner(s)"),
        (match_forgets_the_content, "the hash that each block is registered for"),
        (match_uncounted, "self.hits counts them"),
        (match_number, "up to the first that is not"),
        (match_block_zero_is_false, "up to the first that is not"),
        (match_into_one_list, "that is another owner's own list"),
        (match_three_at_most, "up to the first that is not"),
    ],
}

RIGHT: dict[str, list[Version]] = {
    "kv.blocks_for": [with_ceil, counting],
    "kv.allocate": [allocate_from_the_right, allocate_sorted],
    "kv.append": [append_by_slices, append_in_a_loop],
    "kv.fork": [fork_with_all, fork_and_undo],
    "kv.copy_on_write": [copy_with_release, copy_and_undo],
    "kv.prefix_hashes": [hashes_by_parent, hashes_recursive],
    "kv.match": [match_with_pop, match_with_count],
}
