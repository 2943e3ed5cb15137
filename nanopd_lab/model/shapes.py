"""Named shapes with seeded random weights: for speed work at full size and for tests at toy size."""

from __future__ import annotations

import math
from typing import Any

import torch

from nanopd_lab.model.checkpoint import empty_model
from nanopd_lab.model.support import UnknownModelError

_QWEN = {"max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

#: Name -> the fields of a Hugging Face configuration. Full sizes are those published.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        **_QWEN,
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen3-0.6b": {
        **_QWEN,
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen2-1.5b": {
        **_QWEN,
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "tiny": {**_TINY, "model_type": "llama"},
    # Of sizes that the CUDA kernels take.
    "tiny-gpu": {
        **_TINY,
        "model_type": "qwen3",
        "hidden_size": 256,
        "head_dim": 64,
        "use_sliding_window": False,
    },
    "tiny-llama": {**_TINY, "model_type": "llama", "tie_word_embeddings": True},
    "tiny-qwen2": {**_TINY, "model_type": "qwen2", "use_sliding_window": False},
    "tiny-qwen3": {**_TINY, "model_type": "qwen3", "head_dim": 32, "use_sliding_window": False},
    "tiny-mistral": {**_TINY, "model_type": "mistral", "sliding_window": None},
}


def shape_config(shape: str) -> Any:
    """The Hugging Face configuration of a named shape; no end-of-sequence token."""
    import transformers

    if shape not in SHAPES:
        raise UnknownModelError(
            f"unknown shape {shape!r} in 'random:{shape}'; named shapes are {', '.join(SHAPES)}"
        )
    fields = dict(SHAPES[shape])
    if fields["model_type"] == "qwen2":
        fields.pop("head_dim", None)  # Qwen2 derives it from hidden_size
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
