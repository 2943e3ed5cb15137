"""The named shapes, for whoever needs only their numbers: no torch."""

from __future__ import annotations

from typing import Any

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


def shape_fields(shape: str) -> dict[str, Any]:
    """The fields of a named shape's Hugging Face configuration.

    Raises:
        UnknownModelError: there is none of this name.
    """
    if shape not in SHAPES:
        from nanopd_lab.model.support import UnknownModelError

        raise UnknownModelError(
            f"unknown shape {shape!r} in 'random:{shape}'; named shapes are {', '.join(SHAPES)}"
        )
    fields = dict(SHAPES[shape])
    if fields["model_type"] == "qwen2":
        fields.pop("head_dim", None)  # Qwen2 derives it from hidden_size
    return fields
