"""Versions of the exercises on paged attention."""

from __future__ import annotations

import torch

from nanopd_lab.attention.online import Running, add_page, start
from tests.lab.wrong_versions.base import Version

# ---------------------------------------------------------------------- attention.gather


def gather_whole_blocks(kv_layer, block_table, context_len):
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    pages = kv_layer[block_table[: -(-context_len // block_size)].long()]
    flat = pages.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
    return flat[0], flat[1]


def gather_full_blocks_only(kv_layer, block_table, context_len):
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    pages = kv_layer[block_table[: context_len // block_size].long()]
    flat = pages.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
    return flat[0, :, :context_len], flat[1, :, :context_len]


def gather_without_permute(kv_layer, block_table, context_len):
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    pages = kv_layer[block_table[: -(-context_len // block_size)].long()]
    flat = pages.transpose(0, 1).reshape(2, kv_heads, -1, head_dim)
    return flat[0, :, :context_len], flat[1, :, :context_len]


def gather_swapped(kv_layer, block_table, context_len):
    keys, values = gather_by_slots(kv_layer, block_table, context_len)
    return values, keys


def gather_in_pool_order(kv_layer, block_table, context_len):
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    ids = block_table[: -(-context_len // block_size)].long().sort().values
    flat = kv_layer[ids].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
    return flat[0, :, :context_len], flat[1, :, :context_len]


def gather_ignores_the_table(kv_layer, block_table, context_len):
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    flat = kv_layer[: -(-context_len // block_size)].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
    return flat[0, :, :context_len], flat[1, :, :context_len]


def gather_tokens_first(kv_layer, block_table, context_len):
    keys, values = gather_by_slots(kv_layer, block_table, context_len)
    return keys.transpose(0, 1), values.transpose(0, 1)


def gather_as_float(kv_layer, block_table, context_len):
    keys, values = gather_by_slots(kv_layer, block_table, context_len)
    return keys.float(), values.float()


def gather_one_tensor(kv_layer, block_table, context_len):
    return torch.stack(gather_by_slots(kv_layer, block_table, context_len))


def gather_cleans_the_pool(kv_layer, block_table, context_len):
    kv_layer.nan_to_num_(0)
    return gather_by_slots(kv_layer, block_table, context_len)


def gather_by_the_whole_table(kv_layer, block_table, context_len):
    _, _, kv_heads, _, head_dim = kv_layer.shape
    flat = kv_layer[block_table.long()].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
    return flat[0, :, :context_len], flat[1, :, :context_len]


_buffers = {}


def gather_into_one_buffer(kv_layer, block_table, context_len):
    keys, values = gather_page_by_page(kv_layer, block_table, context_len)
    shape = (kv_layer.shape[3], *keys.shape[::2], keys.dtype)
    buffer = _buffers.setdefault(shape, torch.empty(2, keys.shape[0], 512, keys.shape[2], dtype=keys.dtype))
    buffer[0, :, :context_len], buffer[1, :, :context_len] = keys, values
    return buffer[0, :, :context_len], buffer[1, :, :context_len]


def gather_by_slots(kv_layer, block_table, context_len):
    size = kv_layer.shape[3]
    positions = torch.arange(context_len)
    blocks, offsets = block_table.long()[positions // size], positions % size
    found = kv_layer[blocks, :, :, offsets]  # [context_len, 2, kv_heads, head_dim]
    return found[:, 0].transpose(0, 1), found[:, 1].transpose(0, 1)


def gather_page_by_page(kv_layer, block_table, context_len):
    size = kv_layer.shape[3]
    keys, values = [], []
    for first in range(0, context_len, size):
        block = int(block_table[first // size])
        keys.append(kv_layer[block, 0, :, : context_len - first])
        values.append(kv_layer[block, 1, :, : context_len - first])
    return torch.cat(keys, dim=1), torch.cat(values, dim=1)


# ---------------------------------------------------------------------- attention.add_page


def page_without_rescaling(running, scores, values):
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    weights = torch.exp(scores - maximum)
    total = running.total + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output + weights @ values)


def page_rescales_only_the_total(running, scores, values):
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    weights, shrink = torch.exp(scores - maximum), torch.exp(running.maximum - maximum)
    total = running.total * shrink + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output + weights @ values)


def page_without_maximum(running, scores, values):
    weights = torch.exp(scores)
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    total = running.total + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output + weights @ values)


def page_with_its_own_maximum(running, scores, values):
    page = scores.amax(-1, keepdim=True)
    maximum = torch.maximum(running.maximum, page)
    weights, shrink = torch.exp(scores - page), torch.exp(running.maximum - maximum)
    total = running.total * shrink + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output * shrink + weights @ values)


def page_latest_maximum(running, scores, values):
    maximum = scores.amax(-1, keepdim=True)
    weights, shrink = torch.exp(scores - maximum), torch.exp(running.maximum - maximum)
    total = running.total * shrink + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output * shrink + weights @ values)


def page_one_maximum_for_all_rows(running, scores, values):
    maximum = torch.maximum(running.maximum, scores.max())
    weights, shrink = torch.exp(scores - maximum), torch.exp(running.maximum - maximum)
    total = running.total * shrink + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output * shrink + weights @ values)


def page_divides_at_once(running, scores, values):
    found = page_by_concatenation(running, scores, values)
    return Running(found.maximum, found.total, found.output / found.total)


def page_averages(running, scores, values):
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    weights = torch.exp(scores - maximum)
    return Running(maximum, weights.sum(-1, keepdim=True), weights @ values)


def page_in_place(running, scores, values):
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    weights, shrink = torch.exp(scores - maximum), torch.exp(running.maximum - maximum)
    running.total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
    running.output.mul_(shrink).add_(weights @ values)
    return Running(maximum, running.total, running.output)


def page_wrong_sign(running, scores, values):
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    weights = torch.exp(scores - maximum)
    shrink = torch.exp(maximum - running.maximum).nan_to_num(posinf=1.0)
    total = running.total * shrink + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output * shrink + weights @ values)


def page_starts_at_zero(running, scores, values):
    maximum = torch.maximum(running.maximum.clamp(min=0), scores.amax(-1, keepdim=True))
    weights, shrink = torch.exp(scores - maximum), torch.exp(running.maximum - maximum)
    total = running.total * shrink + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output * shrink + weights @ values)


def page_as_plain_tuple(running, scores, values):
    return tuple(page_by_concatenation(running, scores, values))


def page_flat_maximum(running, scores, values):
    found = page_by_concatenation(running, scores, values)
    return Running(found.maximum[..., 0], found.total[..., 0], found.output)


def page_always_float(running, scores, values):
    running = Running(*(part.float() for part in running))
    return page_by_concatenation(running, scores.float(), values.float())


def page_by_concatenation(running, scores, values):
    both = torch.cat([running.maximum, scores], dim=-1)
    top = both.max(dim=-1, keepdim=True).values
    weights = (both - top).exp()
    old, new = weights[..., :1], weights[..., 1:]
    total = old * running.total + new.sum(dim=-1, keepdim=True)
    return Running(top, total, old * running.output + torch.matmul(new, values))


def page_with_logsumexp(running, scores, values):
    highest = torch.maximum(running.maximum, scores.max(dim=-1, keepdim=True).values)
    page = torch.logsumexp(scores - highest, dim=-1, keepdim=True).exp()
    factor = (running.maximum - highest).exp()
    mixed = torch.einsum("...rt,...td->...rd", (scores - highest).exp(), values)
    return Running(
        maximum=highest, total=running.total * factor + page, output=running.output * factor + mixed
    )


def page_of_sixteen(running, scores, values):
    return add_page(running, scores[..., :16], values[..., :16, :])


def page_hides_with_a_number(running, scores, values):
    return add_page(running, torch.nan_to_num(scores, neginf=-20.0), values)


def page_relative_to_itself(running, scores, values):
    own = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - own)
    maximum = torch.maximum(running.maximum, own)
    old, new = torch.exp(running.maximum - maximum), torch.exp(own - maximum)
    total = running.total * old + weights.sum(-1, keepdim=True) * new
    return Running(maximum, total, running.output * old + weights @ values * new)


def page_clamps_the_shift(running, scores, values):
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    shrink, weights = torch.exp((running.maximum - maximum).clamp(min=-10)), torch.exp(scores - maximum)
    total = running.total * shrink + weights.sum(-1, keepdim=True)
    return Running(maximum, total, running.output * shrink + weights @ values)


# ---------------------------------------------------------------------- attention.attend_pages


def attend(query, kv_layer, block_table, context_len, scale, **change):
    """A right one, one row and head at a time, in which each part can be made wrong."""
    tokens, heads, _ = query.shape
    kv_heads, size = kv_layer.shape[2], kv_layer.shape[3]
    serves = change.get("serves", lambda head: head // (heads // kv_heads))
    last = change.get("last", lambda row: context_len - tokens + row)
    out = torch.empty(query.shape, dtype=query.dtype)
    for row in range(tokens):
        for head in range(heads):
            q = query[row, head].double()
            running = start(q[None])
            for first in range(change.get("first", 0), last(row) + 1, size):
                end = min(size, last(row) + 1 - first)
                page = kv_layer[block_table[first // size], :, serves(head), :end].double()
                keys, values = page[change.get("keys", 0)], page[1 - change.get("keys", 0)]
                running = change.get("add", add_page)(running, (scale * q @ keys.T)[None], values)
            out[row, head] = (running.output / running.total)[0].to(query.dtype)
    return out


def attend_modulo_heads(query, kv_layer, block_table, context_len, scale):
    kv_heads = kv_layer.shape[2]
    return attend(query, kv_layer, block_table, context_len, scale, serves=lambda head: head % kv_heads)


def attend_no_mask(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, scale, last=lambda row: context_len - 1)


def attend_top_left_mask(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, scale, last=lambda row: row)


def attend_without_past(query, kv_layer, block_table, context_len, scale):
    tokens, group = query.shape[0], query.shape[1] // kv_layer.shape[2]
    keys, values = gather_by_slots(kv_layer, block_table, context_len)
    keys, values = (x[:, -tokens:].repeat_interleave(group, 0).double() for x in (keys, values))
    scores = scale * query.transpose(0, 1).double() @ keys.transpose(1, 2)
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1).to(query.dtype)


def attend_not_to_itself(query, kv_layer, block_table, context_len, scale):
    tokens = query.shape[0]
    return attend(
        query,
        kv_layer,
        block_table,
        context_len,
        scale,
        last=lambda row: max(0, context_len - tokens + row - 1),
    )


def attend_no_scale(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, 1.0)


def attend_usual_scale(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, query.shape[-1] ** -0.5)


def attend_swapped(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, scale, keys=1)


def attend_without_rescaling(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, scale, add=page_without_rescaling)


def attend_averages_pages(query, kv_layer, block_table, context_len, scale):
    def add(running, scores, values):
        count = running.total + 1
        return Running(running.maximum, count, running.output + scores.softmax(-1) @ values)

    return attend(query, kv_layer, block_table, context_len, scale, add=add)


def attend_overflows(query, kv_layer, block_table, context_len, scale):
    def add(running, scores, values):
        weights = torch.exp(scores.float()).double()
        return Running(
            running.maximum, running.total + weights.sum(-1, keepdim=True), running.output + weights @ values
        )

    return attend(query, kv_layer, block_table, context_len, scale, add=add)


def attend_last_page(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, scale, add=page_averages)


def attend_whole_last_page(query, kv_layer, block_table, context_len, scale):
    size = kv_layer.shape[3]
    full = -(-context_len // size) * size
    return attend(query, kv_layer, block_table, full, scale)


def attend_masks_with_zero_weight(query, kv_layer, block_table, context_len, scale):
    tokens, heads, dim = query.shape
    kv_heads, size = kv_layer.shape[2], kv_layer.shape[3]
    group, blocks = heads // kv_heads, -(-context_len // size)
    pages = kv_layer[block_table[:blocks].long()].double()
    flat = pages.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, dim).repeat_interleave(group, 1)
    scores = scale * query.transpose(0, 1).double() @ flat[0].transpose(1, 2)
    own = torch.arange(context_len - tokens, context_len)[:, None]
    hidden = torch.arange(blocks * size) > own
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ flat[1]).transpose(0, 1).to(query.dtype)


def attend_drops_a_partial_page(query, kv_layer, block_table, context_len, scale):
    size, tokens = kv_layer.shape[3], query.shape[0]
    full = max(1, context_len // size * size) if context_len > size else context_len
    return attend(
        query,
        kv_layer,
        block_table,
        context_len,
        scale,
        last=lambda row: min(full - 1, context_len - tokens + row),
    )


def attend_by_offset(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, torch.arange(len(block_table)), context_len, scale)


def attend_always_float32(query, kv_layer, block_table, context_len, scale):
    return attend(query.float(), kv_layer, block_table, context_len, scale)


def attend_scales_the_query(query, kv_layer, block_table, context_len, scale):
    query *= scale
    return attend(query, kv_layer, block_table, context_len, 1.0)


def attend_cleans_the_pool(query, kv_layer, block_table, context_len, scale):
    kv_layer.nan_to_num_(0)
    return attend(query, kv_layer, block_table, context_len, scale)


def attend_heads_joined(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, scale).reshape(query.shape[0], -1)


def attend_short_contexts(query, kv_layer, block_table, context_len, scale):
    tokens, size = query.shape[0], kv_layer.shape[3]
    return attend(
        query,
        kv_layer,
        block_table,
        context_len,
        scale,
        first=max(0, (context_len - tokens) // size * size - 512) // size * size,
    )


def attend_in_the_query_type(query, kv_layer, block_table, context_len, scale):
    return attend_folded(query, kv_layer, block_table, context_len, scale, wide=query.dtype)


def attend_rounds_what_it_keeps(query, kv_layer, block_table, context_len, scale):
    def add(running, scores, values):
        return Running(*(part.to(query.dtype).double() for part in add_page(running, scores, values)))

    return attend(query, kv_layer, block_table, context_len, scale, add=add)


def attend_into_one_buffer(query, kv_layer, block_table, context_len, scale):
    result = attend(query, kv_layer, block_table, context_len, scale)
    key = (query.shape, query.dtype)
    return _buffers.setdefault(key, torch.empty_like(result)).copy_(result)


def attend_the_whole_table(query, kv_layer, block_table, context_len, scale):
    kept = kv_layer[block_table.long()]
    table = torch.arange(len(block_table), dtype=torch.int32)
    return attend(query, kept, table, context_len, scale)


def attend_heads_in_the_wrong_order(query, kv_layer, block_table, context_len, scale):
    tokens, heads, dim = query.shape
    result = attend(query, kv_layer, block_table, context_len, scale)
    return result.reshape(tokens, kv_layer.shape[2], -1, dim).transpose(1, 2).reshape(tokens, heads, dim)


def attend_mask_of_another_order(query, kv_layer, block_table, context_len, scale):
    tokens, group = query.shape[0], query.shape[1] // kv_layer.shape[2]
    seen = torch.arange(context_len - tokens, context_len).repeat_interleave(group)
    return attend_folded(query, kv_layer, block_table, context_len, scale, seen=seen)


def attend_never_divides(query, kv_layer, block_table, context_len, scale):
    def add(running, scores, values):
        return add_page(running, scores, values)._replace(total=torch.ones_like(running.total))

    return attend(query, kv_layer, block_table, context_len, scale, add=add)


def attend_rescales_only_the_total(query, kv_layer, block_table, context_len, scale):
    return attend(query, kv_layer, block_table, context_len, scale, add=page_rescales_only_the_total)


def attend_sees_nothing(query, kv_layer, block_table, context_len, scale):
    seen = torch.arange(context_len - query.shape[0] - 1, context_len - 1)
    seen = seen.repeat(query.shape[1] // kv_layer.shape[2])
    return attend_folded(query, kv_layer, block_table, context_len, scale, seen=seen)


def attend_folded(query, kv_layer, block_table, context_len, scale, wide=torch.float32, seen=None):
    tokens, heads, dim = query.shape
    _, _, kv_heads, size, _ = kv_layer.shape
    group = heads // kv_heads
    rows = query.reshape(tokens, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim).to(wide)
    seen = torch.arange(context_len - tokens, context_len).repeat(group) if seen is None else seen
    running = start(rows)
    for first in range(0, context_len, size):
        page = kv_layer[int(block_table[first // size]), :, :, : context_len - first].to(wide)
        scores = scale * torch.matmul(rows, page[0].transpose(1, 2))
        position = first + torch.arange(page.shape[2])
        scores = scores.masked_fill(position[None, :] > seen[:, None], float("-inf"))
        running = add_page(running, scores, page[1])
    result = (running.output / running.total).reshape(kv_heads, group, tokens, dim)
    return result.permute(2, 0, 1, 3).reshape(tokens, heads, dim).to(query.dtype)


def attend_by_gathering(query, kv_layer, block_table, context_len, scale):
    tokens, group = query.shape[0], query.shape[1] // kv_layer.shape[2]
    keys, values = gather_page_by_page(kv_layer, block_table, context_len)
    keys, values = (x.repeat_interleave(group, dim=0).float() for x in (keys, values))
    scores = scale * query.transpose(0, 1).float() @ keys.mT
    hidden = torch.ones(tokens, context_len).triu(context_len - tokens + 1).bool()
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values).transpose(0, 1).to(query.dtype)


WRONG: dict[str, list[tuple[Version, str]]] = {
    "attention.gather": [
        (gather_whole_blocks, "the shape of K"),
        (gather_full_blocks_only, "the shape of K"),
        (gather_without_permute, "is in block"),
        (gather_swapped, "that is the other of K and V"),
        (gather_in_pool_order, "= block_table[0], offset 0"),
        (gather_ignores_the_table, "= block_table[0], offset 0"),
        (gather_tokens_first, "the shape of K"),
        (gather_as_float, "K has the type of what came in"),
        (gather_one_tensor, "return two tensors, K and V"),
        (gather_by_the_whole_table, "index 9999 is out of bounds"),
        (gather_into_one_buffer, "return new tensors each time"),
        (gather_cleans_the_pool, "the caller still needs kv_layer"),
    ],
    "attention.add_page": [
        (page_without_rescaling, "multiply it by exp(old maximum - new maximum)"),
        (page_rescales_only_the_total, "multiply it by exp(old maximum - new maximum)"),
        (page_without_maximum, "relative to the new maximum"),
        (page_with_its_own_maximum, "must be relative to the new maximum of all pages"),
        (page_latest_maximum, "the largest score of all pages up to this one"),
        (page_one_maximum_for_all_rows, "the largest score of all pages up to this one"),
        (page_divides_at_once, "dividing by `total` comes once, after the last page"),
        (page_averages, "what the pages before have left is lost"),
        (page_in_place, "the caller still needs running"),
        (page_wrong_sign, "not its inverse"),
        (page_starts_at_zero, "the largest score of all pages up to this one"),
        (page_as_plain_tuple, "return a Running"),
        (page_of_sixteen, "the largest score of all pages up to this one"),
        (page_hides_with_a_number, "the largest score of all pages up to this one"),
        (page_relative_to_itself, "-inf - -inf is NaN"),
        (page_clamps_the_shift, "total = total *"),
        (page_flat_maximum, "the shape of maximum"),
        (page_always_float, "maximum has the type of what came in"),
    ],
    "attention.attend_pages": [
        (attend_modulo_heads, "query head h reads KV head h // 2, not h % 2"),
        (attend_no_mask, "may not look behind it"),
        (attend_top_left_mask, "the mask starts at the wrong corner"),
        (attend_without_past, "token(s) before these"),
        (attend_not_to_itself, "a query attends to itself as well"),
        (attend_no_scale, "the scores are multiplied by `scale`, once"),
        (attend_usual_scale, "the scores are multiplied by `scale`, once"),
        (attend_swapped, "K and V are swapped"),
        (attend_without_rescaling, "relative to different maxima"),
        (attend_averages_pages, "compare"),
        (attend_overflows, "was the running maximum subtracted before `exp`?"),
        (attend_last_page, "only the last page counts"),
        (attend_whole_last_page, "0 times NaN is NaN"),
        (attend_masks_with_zero_weight, "0 times NaN is NaN"),
        (attend_drops_a_partial_page, "the last page is missing"),
        (attend_by_offset, "0 times NaN is NaN"),
        (attend_always_float32, "the result has the type of what came in"),
        (attend_scales_the_query, "the caller still needs query"),
        (attend_cleans_the_pool, "the caller still needs kv_layer"),
        (attend_heads_joined, "the shape of the result"),
        (attend_short_contexts, "1030 tokens"),
        (attend_in_the_query_type, "rounded on the way"),
        (attend_rounds_what_it_keeps, "rounded on the way"),
        (attend_into_one_buffer, "return new tensors each time"),
        (attend_the_whole_table, "index 9999 is out of bounds"),
        (attend_heads_in_the_wrong_order, "that is right for row 0, head 2"),
        (attend_mask_of_another_order, "this row sees positions 0 to 1, and should see 0 to 0"),
        (attend_never_divides, "divide by the total once"),
        (attend_rescales_only_the_total, "but not the weighted sum of values"),
        (attend_sees_nothing, "NaN from -inf - -inf or 0 / 0"),
    ],
}

RIGHT: dict[str, list[Version]] = {
    "attention.gather": [gather_by_slots, gather_page_by_page],
    "attention.add_page": [page_by_concatenation, page_with_logsumexp],
    "attention.attend_pages": [attend_folded, attend_by_gathering, attend],
}
