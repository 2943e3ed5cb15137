"""How pages get under Hugging Face's unmodified modelling code.

A function registered with `transformers.AttentionInterface` replaces the attention of every layer: it writes
the new K and V through the slot mapping and attends over the block tables. The batch reaches it as a keyword
argument of the model's forward (`model(..., paged=batch)`), which the modelling code passes down untouched.
No mask function is registered under the name, so transformers builds no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from nanopd_lab.attention.base import AttentionBackend, AttentionMetadata
from nanopd_lab.kv.cache import KVCache

NAME = "nanopd_lab"


@dataclass(frozen=True)
class PagedBatch:
    """What attention needs beside Q, K and V: where the pages are, and who attends to what."""

    metadata: AttentionMetadata
    cache: KVCache
    backend: AttentionBackend


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: PagedBatch | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """One layer: store K and V, attend over pages.

    Args:
        query, key, value: `[1, heads, T, head_dim]` of the flat batch, rotary embedding applied

    Returns:
        `[1, T, heads, head_dim]`, and None for the attention weights
    """
    if paged is None:
        raise ValueError("this model attends over pages: call it with paged=PagedBatch(...), or through LLM")
    assert attention_mask is None
    kv_layer = paged.cache.layer(module.layer_idx)  # type: ignore[arg-type]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    paged.backend.store(
        key[0].transpose(0, 1), value[0].transpose(0, 1), kv_layer, paged.metadata.slot_mapping
    )
    out = paged.backend.attend(query[0].transpose(0, 1), kv_layer, paged.metadata, scale)
    return out[None], None


def register() -> str:
    """Make the function known to transformers; returns the name to load models with."""
    AttentionInterface.register(NAME, paged_attention_forward)
    return NAME
