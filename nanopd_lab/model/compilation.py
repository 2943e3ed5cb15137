"""Compiling the model with torch.compile, one decoder layer for all.

    off       Hugging Face's operators as they are (with our attention and stacked projections)
    default   the small operators between the products fused; compiled once with symbolic sizes
    tuned     also searches the fastest product kernels, for each captured size; minutes the first time

Every layer has the same code and the same shapes, so the first one's compilation serves them all ("regional
compilation"); results are kept on disk by torch (TORCHINDUCTOR_CACHE_DIR), and a warm start only loads them.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def compile_model(model: Any, mode: str) -> None:
    """Have the decoder layers, the final norm and, when tuned, the vocabulary projection compiled on first use."""
    if mode == "off":
        return
    import torch
    import torch.fx.experimental._config

    # Symbolic sizes that happen to be equal in the first batch must not be taken to be equal in all.
    torch.fx.experimental._config.use_duck_shape = False
    # One compilation for one row and one for more; tuned ones for every captured size besides.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    inductor: dict[str, Any] = {}
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        # A kernel's launch and first instructions overlap the end of the one before it, as with our own kernels.
        inductor["triton.enable_pdl"] = True
    if mode == "tuned":
        inductor |= {"max_autotune": True, "coordinate_descent_tuning": True}
    options: dict[str, Any] = {"dynamic": mode == "default", "options": inductor or None}
    parts: list[nn.Module] = [*model.base_model.layers, model.base_model.norm]
    if mode == "tuned":
        parts.append(model.get_output_embeddings())
    for part in parts:
        part.compile(**options)
