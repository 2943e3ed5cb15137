"""Versions of the exercises on moving KV blocks."""

from __future__ import annotations

import itertools

import torch

from tests.lab.wrong_versions.base import Version

# ---------------------------------------------------------------------- pack


def pack_a_slice(pool, blocks):
    return pool[blocks[0] : blocks[0] + len(blocks)]


def pack_sorted(pool, blocks):
    return pool[sorted(blocks)]


def pack_by_mask(pool, blocks):
    wanted = torch.tensor([block in blocks for block in range(len(pool))])
    return pool[wanted]


def pack_tuple(pool, blocks):
    return pool[blocks]


def pack_first_layer(pool, blocks):
    return torch.stack([pool[block][0] for block in blocks])


def pack_flat(pool, blocks):
    return torch.cat([pool[block].flatten() for block in blocks])


def pack_a_list(pool, blocks):
    return [pool[block].clone() for block in blocks]


def pack_view(pool, blocks):
    if list(blocks) == list(range(blocks[0], blocks[0] + len(blocks))):
        return pool[blocks[0] : blocks[0] + len(blocks)]
    return pool[list(blocks)]


def pack_float(pool, blocks):
    return torch.stack([pool[block].float() for block in blocks])


def pack_columns(pool, blocks):
    return torch.stack([pool[block] for block in blocks], dim=-1).movedim(-1, 0)


_buffer: dict[tuple[int, ...], torch.Tensor] = {}


def pack_into_one_buffer(pool, blocks):
    shape = (len(blocks), *pool.shape[1:])
    if shape not in _buffer or _buffer[shape].dtype != pool.dtype:
        _buffer[shape] = torch.empty(shape, dtype=pool.dtype)
    for row, block in enumerate(blocks):
        _buffer[shape][row] = pool[block]
    return _buffer[shape]


def pack_and_clear(pool, blocks):
    packed = pool[list(blocks)]
    pool[list(blocks)] = 0
    return packed


def pack_off_by_one(pool, blocks):
    return torch.stack([pool[(block + 1) % len(pool)] for block in blocks])


def pack_nothing(pool, blocks):
    pool[list(blocks)]


def pack_stack(pool, blocks):
    return torch.stack([pool[block] for block in blocks])


def pack_into_empty(pool, blocks):
    buffer = torch.empty(len(blocks), *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    for row, block in enumerate(blocks):
        buffer[row].copy_(pool[block])
    return buffer


def pack_list(pool, blocks):
    return pool[list(blocks)]


# ---------------------------------------------------------------------- unpack


def unpack_new_pool(pool, blocks, buffer):
    pool = pool.clone()
    pool[list(blocks)] = buffer
    return pool


def unpack_other_memory(pool, blocks, buffer):
    changed = pool.clone()
    changed[list(blocks)] = buffer
    pool.data = changed


def unpack_from_zero(pool, blocks, buffer):
    pool[: len(blocks)] = buffer


def unpack_slice(pool, blocks, buffer):
    pool[min(blocks) : min(blocks) + len(blocks)] = buffer


def unpack_sorted(pool, blocks, buffer):
    pool[sorted(blocks)] = buffer


def unpack_gathers(pool, blocks, buffer):
    for row, block in enumerate(blocks):
        buffer[row] = pool[block]


def unpack_temporary(pool, blocks, buffer):
    pool[list(blocks)].copy_(buffer)


def unpack_adds(pool, blocks, buffer):
    pool.index_add_(0, torch.tensor(list(blocks)), buffer)


def unpack_clears_the_rest(pool, blocks, buffer):
    pool.zero_()
    pool[list(blocks)] = buffer


def unpack_all_but_last(pool, blocks, buffer):
    for row in range(len(blocks) - 1):
        pool[blocks[row]] = buffer[row]


def unpack_by_block_number(pool, blocks, buffer):
    for block in blocks:
        pool[block] = buffer[block % len(buffer)]


def unpack_tuple(pool, blocks, buffer):
    pool[blocks] = buffer


def unpack_first_row(pool, blocks, buffer):
    for block in blocks:
        pool[block] = buffer[0]


def unpack_loop(pool, blocks, buffer):
    for row, block in enumerate(blocks):
        pool[block] = buffer[row]


def unpack_index_copy(pool, blocks, buffer):
    return pool.index_copy_(0, torch.as_tensor(list(blocks)), buffer)


# ---------------------------------------------------------------------- arrivals


def arrivals_ignore_overlap(compute_s, copy_s, overlap):
    arrivals, now, free = [], 0.0, 0.0
    for compute, copy in zip(compute_s, copy_s, strict=True):
        now += compute
        free = max(free, now) + copy
        arrivals.append(free)
    return arrivals


def arrivals_two_links(compute_s, copy_s, overlap):
    computed = list(itertools.accumulate(compute_s))
    if not overlap:
        return [computed[-1] + each for each in itertools.accumulate(copy_s)]
    return [ready + copy for ready, copy in zip(computed, copy_s, strict=True)]


def arrivals_link_never_waits(compute_s, copy_s, overlap):
    start = compute_s[0] if overlap else sum(compute_s)
    return [start + each for each in itertools.accumulate(copy_s)]


def arrivals_in_turns(compute_s, copy_s, overlap):
    if not overlap:
        return [sum(compute_s) + each for each in itertools.accumulate(copy_s)]
    return list(itertools.accumulate(a + b for a, b in zip(compute_s, copy_s, strict=True)))


def arrivals_slower_stage(compute_s, copy_s, overlap):
    if not overlap:
        return [sum(compute_s) + each for each in itertools.accumulate(copy_s)]
    return list(itertools.accumulate(max(a, b) for a, b in zip(compute_s, copy_s, strict=True)))


def arrivals_begin_of_copy(compute_s, copy_s, overlap):
    ends = arrivals_right_a(compute_s, copy_s, overlap)
    return [end - copy for end, copy in zip(ends, copy_s, strict=True)]


def arrivals_last_only(compute_s, copy_s, overlap):
    return arrivals_right_a(compute_s, copy_s, overlap)[-1]


def arrivals_copy_with_compute(compute_s, copy_s, overlap):
    if not overlap:
        return [sum(compute_s) + each for each in itertools.accumulate(copy_s)]
    arrivals, now, free = [], 0.0, 0.0
    for compute, copy in zip(compute_s, copy_s, strict=True):
        free = max(free, now) + copy
        now += compute
        arrivals.append(free)
    return arrivals


def arrivals_all_at_the_end(compute_s, copy_s, overlap):
    if overlap:
        return arrivals_right_a(compute_s, copy_s, overlap)
    return [sum(compute_s) + sum(copy_s)] * len(copy_s)


def arrivals_constant_copy(compute_s, copy_s, overlap):
    return arrivals_right_a(compute_s, [copy_s[0]] * len(copy_s), overlap)


def arrivals_rounded(compute_s, copy_s, overlap):
    return [round(end, 1) for end in arrivals_right_a(compute_s, copy_s, overlap)]


def arrivals_eat(compute_s, copy_s, overlap):
    arrivals, now, free, total = [], 0.0, 0.0, sum(compute_s)
    while compute_s:
        now += compute_s.pop(0)
        free = max(free, now if overlap else total) + copy_s.pop(0)
        arrivals.append(free)
    return arrivals


def arrivals_right_a(compute_s, copy_s, overlap):
    arrivals, now, free = [], 0.0, 0.0
    for compute, copy in zip(compute_s, copy_s, strict=True):
        now += compute
        free = max(free, now if overlap else sum(compute_s)) + copy
        arrivals.append(free)
    return arrivals


def arrivals_right_b(compute_s, copy_s, overlap):
    """Johnson's formula: the worst chunk to have waited for."""
    count = len(compute_s)
    ready = [sum(compute_s[: k + 1] if overlap else compute_s) for k in range(count)]
    return [max(ready[k] + sum(copy_s[k : i + 1]) for k in range(i + 1)) for i in range(count)]


def arrivals_right_c(compute_s, copy_s, overlap):
    ready = list(itertools.accumulate(compute_s)) if overlap else [sum(compute_s)] * len(compute_s)
    arrivals = [ready[0] + copy_s[0]]
    for index in range(1, len(ready)):
        begin = ready[index] if ready[index] > arrivals[-1] else arrivals[-1]
        arrivals.append(begin + copy_s[index])
    return arrivals


WRONG: dict[str, list[tuple[Version, str]]] = {
    "transfer.pack_blocks": [
        (pack_a_slice, "the shape of the buffer"),
        (pack_sorted, "belongs to block"),
        (pack_by_mask, "belongs to block"),
        (pack_tuple, "the buffer"),
        (pack_first_layer, "the shape of the buffer"),
        (pack_flat, "the shape of the buffer"),
        (pack_a_list, "the buffer is a tensor"),
        (pack_view, "a view"),
        (pack_float, "has the type of what came in"),
        (pack_columns, "a link wants one piece"),
        (pack_into_one_buffer, "return new tensors"),
        (pack_and_clear, "the caller still needs pool"),
        (pack_off_by_one, "is there"),
        (pack_nothing, "is a `return` missing?"),
    ],
    "transfer.unpack_blocks": [
        (unpack_new_pool, "nothing was written"),
        (unpack_other_memory, "nothing was written"),
        (unpack_from_zero, "of the buffer"),
        (unpack_slice, "blocks = (3, 0)"),
        (unpack_sorted, "row 1 is there"),
        (unpack_gathers, "the caller still needs buffer"),
        (unpack_temporary, "nothing was written"),
        (unpack_adds, "gets row 0"),
        (unpack_clears_the_rest, "somebody else's"),
        (unpack_all_but_last, "of the buffer"),
        (unpack_by_block_number, "of the buffer"),
        (unpack_tuple, "a tuple"),
        (unpack_first_row, "row 0 is there"),
    ],
    "transfer.chunk_arrivals": [
        (arrivals_ignore_overlap, "without overlap no copy begins"),
        (arrivals_two_links, "the link is busy with chunk 0"),
        (arrivals_link_never_waits, "when the link is free"),
        (arrivals_in_turns, "when the link is free"),
        (arrivals_slower_stage, "copied from 4 to 5 s"),
        (arrivals_begin_of_copy, "chunk 0: computed at 4 s"),
        (arrivals_last_only, "return a list"),
        (arrivals_copy_with_compute, "computed at 4 s"),
        (arrivals_all_at_the_end, "chunk 0: without overlap"),
        (arrivals_constant_copy, "copied from"),
        (arrivals_rounded, "copied from"),
        (arrivals_eat, "the caller still needs"),
    ],
}
RIGHT: dict[str, list[Version]] = {
    "transfer.pack_blocks": [pack_list, pack_stack, pack_into_empty],
    "transfer.unpack_blocks": [unpack_loop, unpack_index_copy],
    "transfer.chunk_arrivals": [arrivals_right_a, arrivals_right_c, arrivals_right_b],
}
