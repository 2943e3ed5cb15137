"""Small seeded batches on which every kernel is compared with float64: for the tests and `kernels check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanopd_lab.kernels import reference
from nanopd_lab.kernels.launches import AttentionShape


@dataclass(frozen=True)
class Problem:
    """A flat batch over a paged cache. query: [T, heads, head_dim], a slice of a wider product as in a real
    layer."""

    shape: AttentionShape
    query: torch.Tensor
    kv_cache: torch.Tensor
    kv_layer: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    query_start: torch.Tensor

    @property
    def scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return self.shape.head_dim**-0.5

    @property
    def decode_args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """What `emulated.paged_decode` takes after the rung."""
        return self.query, self.kv_layer, self.block_tables, self.context_lens, self.scale

    @property
    def kv_bytes(self) -> int:
        """K and V that must be read, each once."""
        shape = self.shape
        return int(self.context_lens.sum()) * 2 * shape.kv_heads * shape.head_dim * shape.element_bytes

    def wanted(self) -> torch.Tensor:
        """The float64 answer, `[T, heads, head_dim]`: what every kernel is compared with."""
        return reference.attend(
            self.query, self.kv_layer, self.block_tables, self.context_lens, self.query_start, self.scale
        )


def make_problem(
    dtype: torch.dtype,
    head_dim: int,
    block_size: int,
    group: int,
    kv_heads: int,
    contexts: Sequence[int],
    query_lens: Sequence[int] | None = None,
    seed: int = 0,
    device: str = "cpu",
    layers: int = 2,
) -> Problem:
    """Random K, V and queries; blocks lie scattered; what lies past a context, and every block that is in no
    table, is NaN, so that a kernel that reads or uses it shows. query_lens defaults to one token a
    sequence."""
    generator = torch.Generator().manual_seed(seed)
    query_lens = query_lens or [1] * len(contexts)
    heads = group * kv_heads
    counts = [-(-context // block_size) for context in contexts]
    num_blocks = sum(counts) + 3
    cache = torch.full((num_blocks, layers, 2, kv_heads, block_size, head_dim), float("nan"))
    order = torch.randperm(num_blocks, generator=generator)
    tables = torch.zeros(len(contexts), max(1, *counts), dtype=torch.int32)
    used = 0
    for s, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        blocks = order[used : used + count]
        used += count
        tables[s, :count] = blocks.int()
        for i, block in enumerate(blocks.tolist()):
            filled = min(block_size, context - i * block_size)
            size = (layers, 2, kv_heads, filled, head_dim)
            cache[block, :, :, :, :filled] = torch.randn(size, generator=generator)
    tokens = sum(query_lens)
    product = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator)
    cache, product = cache.to(device, dtype), product.to(device, dtype)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    return Problem(
        AttentionShape(dtype, heads, kv_heads, head_dim, block_size),
        product[:, :heads],
        cache,
        cache[:, layers - 1],
        tables.to(device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
        starts.to(device),
    )
