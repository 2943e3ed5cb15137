"""What the kernels must compute, written as plainly as possible: the oracle, and the ops on a CPU.

Everything here works on any device and is slow. `dtype=float64` is the oracle that every rung is compared
with.
"""

from __future__ import annotations

import torch

MOST_SCORES = 1 << 26


def pages_of(
    kv_layer: torch.Tensor, block_table: torch.Tensor, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of one sequence, `[kv_heads, context, head_dim]` each, gathered from `kv_layer`
    (`[num_blocks, 2, kv_heads, block_size, head_dim]`)."""
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    blocks = block_table[: -(-context // block_size)].long()
    both = kv_layer[blocks].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
    return both[0, :, :context], both[1, :, :context]


def attend(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Causal attention of a flat batch over its pages: the contract of `AttentionBackend.attend`.

    query: [T, heads, head_dim]; the result has its shape, in `dtype`. Rows of a sequence without context are
    zeros.
    """
    tokens, heads, head_dim = query.shape
    kv_heads = kv_layer.shape[2]
    out = torch.zeros(tokens, heads, head_dim, dtype=dtype, device=query.device)
    starts, contexts = query_start.tolist(), context_lens.tolist()
    for s, context in enumerate(contexts):
        begin, end = starts[s], starts[s + 1]
        if context == 0 or begin == end:
            continue
        keys, values = (x.to(dtype) for x in pages_of(kv_layer, block_tables[s], context))
        # All scores of a long prompt at once would be tens of gigabytes.
        for rows in torch.arange(begin, end, device=query.device).split(
            max(1, MOST_SCORES // (heads * context))
        ):
            q = query[rows].to(dtype).view(len(rows), kv_heads, heads // kv_heads, head_dim)
            scores = torch.einsum("tkgd,kcd->kgtc", q, keys) * scale
            position = rows + (context - end)
            hidden = torch.arange(context, device=query.device) > position[:, None]
            weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
            out[rows] = torch.einsum("kgtc,kcd->tkgd", weights, values).reshape(len(rows), heads, head_dim)
    return out


def store(key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write K and V rows to their slots; negative slots are padding."""
    used = slot_mapping >= 0
    slots, block_size = slot_mapping[used], kv_layer.shape[3]
    blocks, offsets = slots // block_size, slots % block_size
    kv_layer[blocks, 0, :, offsets] = key[used]
    kv_layer[blocks, 1, :, offsets] = value[used]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖; infinite where anything is NaN, so that NaN never passes a bound."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.to(wanted.dtype) - wanted).norm() / wanted.norm().clamp_min(1e-30))


TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Largest relative error against float64: rounding of the output, and of the weights on tensor cores."""
