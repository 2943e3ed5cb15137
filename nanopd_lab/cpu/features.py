"""What this processor is good at."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import torch

ZEN_5 = 26  # the processors' family


@lru_cache(maxsize=1)
def has_bf16_products() -> bool:
    """True if the processor multiplies bf16 faster than float32 (Intel AMX, AVX-512 with BF16, Arm BF16)."""
    query = getattr(torch.cpu, "get_capabilities", None)  # since torch 2.10
    if query is None:
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    capabilities: dict[str, object] = query()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


@lru_cache(maxsize=1)
def has_wide_registers() -> bool:
    """True if the processor has registers of sixteen floats, and so room for the sums of `dense_cpu.cpp` (AVX-512)."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@lru_cache(maxsize=1)
def library_uses_wide_registers() -> bool:
    """False on AMD's from Zen 5 on: they compute on registers of sixteen floats at full speed, and MKL, the matrix
    library of PyTorch, multiplies with those of eight there."""
    try:
        vendor, family = _vendor_and_family(Path("/proc/cpuinfo").read_text())
    except OSError:
        return True
    return not (torch.backends.mkl.is_available() and vendor == "AuthenticAMD" and family >= ZEN_5)


def _vendor_and_family(cpuinfo: str) -> tuple[str, int]:
    """Of the first processor of Linux's list; "" and 0 where it does not say."""
    fields = dict(
        re.findall(r"^(vendor_id|cpu family)\s*: (\S+)$", cpuinfo.partition("\n\n")[0], re.MULTILINE)
    )
    return fields.get("vendor_id", ""), int(fields.get("cpu family", 0))
