"""KV store of one layer, and copies, gathers and scatters of whole blocks, each beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nanopd_lab.bench.kernel_decode import BLOCK_SIZE, HEAD_DIM, KV_HEADS
from nanopd_lab.bench.kernel_timer import Timer, summary

MOVED_LAYERS = 36


def bench_moves(timer: Timer, copy_gb_s: float, rounds: int) -> list[dict[str, Any]]:
    """KV store of one layer and copy-on-write, gather and scatter of whole blocks, for several numbers of
    tokens."""
    rows = []
    for tokens in (512, 4096, 16384):
        blocks = tokens // BLOCK_SIZE
        order = torch.randperm(2 * blocks, device="cuda")
        times = timer(_move_candidates(tokens, order), rounds)
        for name, each in times.items():
            one_layer = name in ("kv_store", "copy_of_the_same_bytes")
            row_bytes = 2 * KV_HEADS * HEAD_DIM * 2  # K and V of a token and layer, bf16
            size = 2 * tokens * row_bytes * (1 if one_layer else MOVED_LAYERS)  # read and written
            row: dict[str, Any] = {"operation": name, "tokens": tokens, "bytes": size, **summary(each)}
            row["gb_s"] = size / row["median_us"] / 1e3
            row["fraction_of_copy"] = row["gb_s"] / copy_gb_s
            rows.append(row)
    return rows


def _move_candidates(tokens: int, order: torch.Tensor) -> dict[str, Callable[[], Any]]:
    blocks = tokens // BLOCK_SIZE
    shape = (2 * blocks + 8, MOVED_LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    pool = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    slots = (order[:blocks, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device="cuda")).flatten()
    key = torch.randn(tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    value = torch.randn_like(key)
    sources, targets = order[:blocks].contiguous(), order[blocks : 2 * blocks].contiguous()
    buffer = torch.zeros(blocks, *shape[1:], dtype=torch.bfloat16, device="cuda")
    flat = torch.randn(2 * key.numel(), dtype=torch.bfloat16, device="cuda")
    flat_to = torch.empty_like(flat)
    return {
        "kv_store": lambda: torch.ops.nanopd.kv_store(key, value, pool[:, 3], slots),
        "copy_of_the_same_bytes": lambda: flat_to.copy_(flat),
        "copy_blocks": lambda: torch.ops.nanopd.copy_blocks(pool, sources, targets),
        "gather_blocks": lambda: torch.ops.nanopd.gather_blocks(pool, sources),
        "scatter_blocks": lambda: torch.ops.nanopd.scatter_blocks(pool, targets, buffer),
    }
