"""What can be loaded, decided from the configuration alone, before a byte of weights is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: `model_type` of a configuration -> the class of Hugging Face that implements it, used unmodified.
SUPPORTED_ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

#: Rotary embeddings whose angles depend on a token's position only. The others ("dynamic", "longrope") depend
#: on the longest position of the *batch*, so one sequence would change its neighbours' output.
SUPPORTED_ROPE_TYPES = ("default", "linear", "yarn", "llama3")

SUPPORTED_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


class UnknownModelError(ValueError):
    """No model is known under this name, or nothing that is a model lies at this path."""


class ModelUnavailableError(ValueError):
    """The model is known but cannot be got at from here (no network, no pip); the text says what to run."""


class UnsupportedModelError(ValueError):
    """A model whose attention, architecture or number format this engine does not implement."""


class CorruptCheckpointError(ValueError):
    """A checkpoint that lacks weights, has foreign ones or is cut short."""


def _refuse(source: str, found: str, way_out: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{source}: {found}. Supported are {', '.join(SUPPORTED_ARCHITECTURES.values())}, each with full "
        f"causal attention and unquantized weights. {way_out}"
    )


def check_supported(config: Mapping[str, Any], source: str) -> None:
    """Raise `UnsupportedModelError` unless the attention that `config` describes is one that we implement.

    `config` is the content of a `config.json` (or `PretrainedConfig.to_dict()`); `source` names the model in
    the message.
    """
    model_type = str(config.get("model_type", "")) or "(no model_type)"
    if config.get("is_encoder_decoder"):
        raise _refuse(source, f"{model_type!r} is an encoder-decoder", "Choose a decoder-only model.")
    if model_type not in SUPPORTED_ARCHITECTURES:
        raise _refuse(
            source,
            f"architecture {model_type!r} is not implemented",
            "Choose a model of one of these architectures, for example Qwen/Qwen3-0.6B.",
        )
    classes = config.get("architectures") or [SUPPORTED_ARCHITECTURES[model_type]]
    if SUPPORTED_ARCHITECTURES[model_type] not in classes:
        raise _refuse(
            source, f"its class is {', '.join(map(str, classes))}", "Choose the variant that generates text."
        )
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise _refuse(
            source,
            f"its weights are quantized ({method!r})",
            "Choose the variant in bf16 or fp32, or a GGUF file, which is dequantized when it is loaded.",
        )
    _check_window(config, model_type, source)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = str(rope.get("rope_type", rope.get("type", "default")))
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise _refuse(
            source,
            f"rotary embedding of type {rope_type!r} depends on the longest sequence of the batch",
            f"Rotary types implemented: {', '.join(SUPPORTED_ROPE_TYPES)}.",
        )


def _check_window(config: Mapping[str, Any], model_type: str, source: str) -> None:
    window = config.get("sliding_window")
    # Qwen's configurations name a window that is off unless this flag says otherwise; Mistral's has no flag.
    uses_window = bool(config.get("use_sliding_window")) if model_type.startswith("qwen") else bool(window)
    if uses_window:
        raise _refuse(
            source,
            f"{model_type!r} with a sliding window of {window} tokens",
            "Choose a version without one (Mistral 7B from v0.2 on, Qwen with use_sliding_window false).",
        )
    kinds = sorted({str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"})
    if kinds:
        raise _refuse(
            source, f"it has layers of type {', '.join(kinds)}", "Choose a model of full_attention only."
        )


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise `ValueError` unless models can run in `dtype` on `device`."""
    allowed = SUPPORTED_DTYPES.get(device.type)
    if allowed is None:
        raise ValueError(
            f"device {device} is not supported; use one of {', '.join(SUPPORTED_DTYPES)} (device='cpu' works "
            "everywhere)"
        )
    if dtype in allowed:
        return
    names = ", ".join(str(each).removeprefix("torch.") for each in allowed)
    reason = ""
    if dtype is torch.float16:
        reason = (
            "; float16's largest value, 65504, overflows in accumulations that CPU kernels keep in float16"
        )
    raise ValueError(
        f"dtype {str(dtype).removeprefix('torch.')} is not supported on {device.type}; use {names}{reason}"
    )
