"""Keep the tensors that attention really saw, to look at them afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanopd_lab.attention.base import AttentionBackend, AttentionMetadata


@dataclass(frozen=True)
class Captured:
    """One layer's attention of one sequence in one step, with all that it needs to be done again.

    query:       `[tokens, heads, head_dim]`
    kv_layer:    `[blocks, 2, kv_heads, block_size, head_dim]`, a copy of the sequence's own pages
    block_table: int32 `[blocks]`, into `kv_layer`
    """

    query: torch.Tensor
    kv_layer: torch.Tensor
    block_table: torch.Tensor
    context_len: int
    scale: float


class CaptureBackend:
    """An `AttentionBackend` that passes everything on, and copies what the first sequence of a step attends to.

    `layers` holds the latest step, one entry a layer; a step begins when a layer comes again.

    Args:
        inner: what stores and attends
    """

    name = "capture"

    def __init__(self, inner: AttentionBackend) -> None:
        self.inner = inner
        self.layers: list[Captured] = []
        self._first: int | None = None  # address of the first layer of a step

    def store(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        self.inner.store(key, value, kv_layer, slot_mapping)

    def attend(
        self, query: torch.Tensor, kv_layer: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        if self._first in (None, kv_layer.data_ptr()):
            self._first, self.layers = kv_layer.data_ptr(), []
        length, context = metadata.query_lens_host[0], metadata.context_lens_host[0]
        blocks = -(-context // kv_layer.shape[3])
        pages = kv_layer[metadata.block_tables[0, :blocks].long()].clone()
        table = torch.arange(blocks, dtype=torch.int32)
        self.layers.append(Captured(query[:length].clone(), pages, table, context, scale))
        return self.inner.attend(query, kv_layer, metadata, scale)
