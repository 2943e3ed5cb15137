"""What this processor is good at."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=1)
def has_bf16_matrix_unit() -> bool:
    """True if the processor multiplies bf16 matrices faster than float32 ones (Intel AMX, Arm BF16)."""
    query = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.10
    if query is None:
        return bool(torch.cpu._is_amx_tile_supported())
    capabilities: dict[str, object] = query()
    return bool(capabilities.get("amx_bf16") or capabilities.get("bf16"))


@lru_cache(maxsize=1)
def has_wide_registers() -> bool:
    """True if the processor has registers of sixteen floats, and so room for the sums of `dense_cpu.cpp` (AVX-512)."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()
