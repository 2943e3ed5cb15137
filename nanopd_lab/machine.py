"""What this machine has, for `nanopd-lab info` and the first notebook."""

from __future__ import annotations

import platform
from typing import Any

from nanopd_lab import __version__


def describe_machine() -> dict[str, Any]:
    """Versions, processors, memory, and the parts that the engine would use here."""
    import torch
    import transformers

    from nanopd_lab import hostcc
    from nanopd_lab.cache import cache_dir
    from nanopd_lab.cpu import library
    from nanopd_lab.cpu.features import has_bf16_products
    from nanopd_lab.provenance import machine

    found = machine()
    memory = found["memory_bytes"]
    report: dict[str, Any] = {
        "nanopd_lab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": f"{found['cpu']} ({found['cores']} cores, {found['torch_threads']} torch threads)",
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "bf16 products": "yes" if has_bf16_products() else "no",
        "C++ compiler": hostcc.find_compiler() or "none: decode batches fall back to PyTorch",
        "C++ kernels": "compiled" if library.available() else "not available",
        "GPUs": ", ".join(found["gpus"]) or "none: everything runs on the CPU",
        "cache folder": str(cache_dir()),
    }
    return report
