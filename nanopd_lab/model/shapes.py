"""Named shapes with seeded random weights: for speed work at full size and for tests at toy size."""

from __future__ import annotations

import math
from typing import Any

import torch

from nanopd_lab.model.checkpoint import empty_model
from nanopd_lab.model.shape_table import SHAPES, shape_fields

__all__ = ["SHAPES", "random_model", "shape_config"]


def shape_config(shape: str) -> Any:
    """The Hugging Face configuration of a named shape; no end-of-sequence token."""
    import transformers

    fields = shape_fields(shape)
    model_type = fields.pop("model_type")
    return transformers.AutoConfig.for_model(
        model_type, **fields, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )


def random_model(
    config: Any, *, seed: int, dtype: torch.dtype, device: torch.device, attn_implementation: str
) -> Any:
    """A model with weights drawn from `seed`; same seed and kind of device, same weights.

    Each matrix is drawn where it will live and in its final type, N(0, 1/fan_in), so that activations keep
    their size through any number of layers, and matrices that write to the residual stream are scaled by
    1/sqrt(2 layers) (GPT-2, section 2.3). Embeddings are small beside what the layers add: otherwise a model
    with tied embeddings would only repeat its input.
    """
    model = empty_model(config, dtype=dtype, device=device, attn_implementation=attn_implementation)
    generator = torch.Generator(device=device).manual_seed(seed)
    residual_scale = 1.0 / math.sqrt(2.0 * config.num_hidden_layers)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kind = name.split(".")[-2]
            if kind.endswith("norm"):
                weight.normal_(1.0, 0.1, generator=generator)
            elif name.endswith(".bias"):
                weight.normal_(0.0, 0.1, generator=generator)
            else:
                std = 1.0 / math.sqrt(weight.shape[-1])
                if kind in ("o_proj", "down_proj"):
                    std *= residual_scale
                elif kind == "lm_head":
                    std *= 2.0
                weight.normal_(0.0, std, generator=generator)
    return model
