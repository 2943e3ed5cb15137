"""Attention page by page, with an online softmax: no gathered copy, no matrix of scores.

One pass over the pages of a sequence. What is kept between pages is, for every query row, the largest score
so far, the sum of exponentials relative to it, and the weighted sum of values relative to it (Milakov and
Gimelshein, 2018; the inner loop of FlashAttention, Dao et al., 2022). Plain PyTorch, any device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from nanopd_lab.attention.base import AttentionMetadata
from nanopd_lab.attention.torch_backend import store_rows


class Running(NamedTuple):
    """What attention has seen so far; `output / total` is the answer for the pages up to now.

    maximum: `[..., rows, 1]`, the largest score; -infinity before the first page
    total:   `[..., rows, 1]`, sum of exp(score - maximum)
    output:  `[..., rows, head_dim]`, sum of exp(score - maximum) * value
    """

    maximum: torch.Tensor
    total: torch.Tensor
    output: torch.Tensor


def start(like: torch.Tensor) -> Running:
    """Before the first page, for queries `like` (`[..., rows, head_dim]`)."""
    column = torch.zeros_like(like[..., :1])
    return Running(torch.full_like(column, float("-inf")), column, torch.zeros_like(like))


def add_page(running: Running, scores: torch.Tensor, values: torch.Tensor) -> Running:
    """Take in one page: shift everything so far to the new maximum, then add the page's part.

    Args:
        running: what the pages before have left; stays as it is
        scores: `[..., rows, tokens]`, scaled; -infinity where a row may not look. Every row has seen at least
            one score once the first page is in.
        values: `[..., tokens, head_dim]`
    """
    maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))
    shrink = torch.exp(running.maximum - maximum)
    weights = torch.exp(scores - maximum)
    return Running(
        maximum,
        running.total * shrink + weights.sum(-1, keepdim=True),
        running.output * shrink + weights @ values,
    )


def attend_pages(
    query: torch.Tensor, kv_layer: torch.Tensor, block_table: torch.Tensor, context_len: int, scale: float
) -> torch.Tensor:
    """Causal attention of one sequence's last tokens over its pages, one page at a time.

    Args:
        query: `[tokens, heads, head_dim]`; row i stands at position `context_len - tokens + i`. Head h reads KV
            head `h // (heads // kv_heads)`.
        kv_layer: `[num_blocks, 2, kv_heads, block_size, head_dim]`; K is 0, V is 1
        block_table: block ids, at least ceil(context_len / block_size) of them
        context_len: tokens in the cache; slots behind them hold anything, NaN too
        scale: of the scores

    Returns:
        `[tokens, heads, head_dim]`, in the query's type; computed in float32 or wider
    """
    tokens, heads, dim = query.shape
    _, _, kv_heads, block_size, _ = kv_layer.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    # The heads that share a KV head lie one under the other: [kv_heads, group * tokens, head_dim].
    rows = query.view(tokens, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim).to(wide)
    seen = torch.arange(context_len - tokens, context_len, device=query.device).repeat(heads // kv_heads)
    running = start(rows)
    for first in range(0, context_len, block_size):
        page = kv_layer[block_table[first // block_size], :, :, : context_len - first].to(wide)
        keys, values = page[0], page[1]  # [kv_heads, tokens of the page, head_dim]
        scores = scale * rows @ keys.transpose(-1, -2)
        position = torch.arange(first, first + keys.shape[1], device=query.device)
        scores = scores.masked_fill(position > seen[:, None], float("-inf"))
        running = add_page(running, scores, values)
    out = (running.output / running.total).view(kv_heads, -1, tokens, dim)
    return out.permute(2, 0, 1, 3).reshape(tokens, heads, dim).to(query.dtype)


class OnlineBackend:
    """See `AttentionBackend`. One sequence after the other.

    Args:
        attend_pages: what attends for one sequence; a learner's own goes in here
    """

    name = "online"

    def __init__(self, attend_pages: Callable[..., torch.Tensor] = attend_pages) -> None:
        self.attend_pages = attend_pages

    def store(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        store_rows(key, value, kv_layer, slot_mapping)

    def attend(
        self, query: torch.Tensor, kv_layer: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        row = 0
        for index, length in enumerate(metadata.query_lens_host):
            rows = slice(row, row + length)
            table, context = metadata.block_tables[index], metadata.context_lens_host[index]
            out[rows] = self.attend_pages(query[rows], kv_layer, table, context, scale)
            row += length
        return out
