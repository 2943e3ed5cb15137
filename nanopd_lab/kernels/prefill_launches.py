"""Launch of paged prefill."""

from __future__ import annotations

import torch

from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import AttentionShape, DeviceLimits, Launch

# Thread blocks of paged prefill that a multiprocessor holds: what its registers allow.
PREFILL_RESIDENT = {64: 2, 128: 1, 256: 2}


def prefill_launch(
    shape: AttentionShape, limits: DeviceLimits | None = None, warps: int = 8, blocks: int | None = None
) -> Launch:
    """Launch of paged prefill: as many blocks as the GPU holds, whatever the batch. They divide it on the device.

    `blocks` overrides the grid. Raises KernelArgumentError for fp32 (its products don't run on these tensor-core
    instructions).
    """
    if shape.dtype == torch.float32:
        raise KernelArgumentError(
            "paged prefill takes float16 or bfloat16; fp32 goes through gather and SDPA"
        )
    limits = limits or DeviceLimits()
    keys = 32 if shape.head_dim == 256 else 64
    if shape.head_dim == 256:
        warps = 4
    return Launch(
        "prefill.cu",
        "paged_prefill",
        (blocks or limits.multiprocessors * PREFILL_RESIDENT[shape.head_dim], 1, 1),
        32 * warps,
        (16 * warps + 4 * keys) * shape.head_dim * shape.element_bytes,
        {**shape.defines, "WARPS": warps, "KEYS": keys},
        overlaps=True,
    )
