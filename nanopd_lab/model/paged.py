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

from nanopd_lab.attention.base import AttentionBackend, AttentionMetadata, store_and_attend
from nanopd_lab.kv.cache import KVCache

NAME = "nanopd_lab"


@dataclass(frozen=True)
class PagedBatch:
    """What attention needs beside Q, K and V and the pages: who attends to what, and by which backend."""

    metadata: AttentionMetadata
    backend: AttentionBackend


def bind_cache(model: torch.nn.Module, cache: KVCache) -> None:
    """Give every attention module its layer of the pool, as `kv_layer`, unless it has that already.

    As an attribute, not through the layer's number: a compiled layer then takes the pages as an input like its
    weights, and one compilation serves all layers. Engines may share a model, so it is bound before each step.
    """
    if getattr(model, "bound_cache", None) is cache:
        return
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "o_proj"):
            module.kv_layer = cache.layer(module.layer_idx)  # type: ignore[arg-type]
    model.bound_cache = cache  # type: ignore[assignment]


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
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    kv_layer: torch.Tensor = module.kv_layer  # type: ignore[assignment]
    out = store_and_attend(paged.backend, q, k, v, kv_layer, paged.metadata, scale)
    return out[None], None


def register() -> str:
    """Make the function known to transformers; returns the name to load models with."""
    AttentionInterface.register(NAME, paged_attention_forward)
    return NAME
