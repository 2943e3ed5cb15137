"""Scratch memory of attention: where blocks that share a sequence leave their parts, and count who is last.

    [counters][partial outputs][partial sums]      zeroed once, see `ops.make_workspace`

Decode and prefill take turns to use one workspace: each leaves the counters at zero.
"""

from __future__ import annotations

import torch

from nanopd_lab.kernels.decode_launches import MAX_ITEMS, max_grid
from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import AttentionShape, DeviceLimits, Launch
from nanopd_lab.kernels.prefill_launches import prefill_launch

PREFILL_PLACES = 4  # parts of divided tiles, for each thread block


def decode_workspace_bytes(shape: AttentionShape, blocks: int) -> int:
    """Scratch memory of the split rungs: counters, then two places a block for partial outputs and sums."""
    return 4 * MAX_ITEMS + 2 * blocks * shape.group * (shape.head_dim + 2) * 4


def workspace_bytes(shape: AttentionShape, limits: DeviceLimits | None = None) -> int:
    """Scratch memory that decode and prefill take turns to use, on a device of such limits."""
    limits = limits or DeviceLimits()
    decode = decode_workspace_bytes(shape, max_grid(limits))
    if shape.dtype == torch.float32:
        return decode
    return max(decode, prefill_workspace_bytes(shape, prefill_launch(shape, limits)))


def _split(
    workspace: torch.Tensor, shape: AttentionShape, needed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if workspace.dtype != torch.uint8 or not workspace.is_contiguous() or workspace.numel() < needed:
        raise KernelArgumentError(
            f"workspace must be contiguous uint8 of at least {needed} bytes, zeroed once (make_workspace); "
            f"got {workspace.dtype} of {workspace.numel()}"
        )
    counters = 4 * MAX_ITEMS
    outputs = counters + (needed - counters) // (shape.head_dim + 2) * shape.head_dim
    return (
        workspace[counters:outputs].view(torch.float32),
        workspace[outputs:needed].view(torch.float32),
        workspace[:counters].view(torch.int32),
    )


def split_workspace(
    workspace: torch.Tensor, shape: AttentionShape, blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(partial, partial sums, counters): views of a uint8 workspace, which must have been zeroed once.

    Raises KernelArgumentError when it is too small for `blocks`.
    """
    return _split(workspace, shape, decode_workspace_bytes(shape, blocks))


def prefill_workspace_bytes(shape: AttentionShape, launch: Launch) -> int:
    """Scratch memory of paged prefill: counters, then places for the parts of divided tiles."""
    rows = PREFILL_PLACES * launch.grid[0] * launch.threads // 2
    return 4 * MAX_ITEMS + rows * (shape.head_dim + 2) * 4


def prefill_workspace(
    workspace: torch.Tensor, shape: AttentionShape, launch: Launch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(partial, partial sums, counters, places): views of a workspace, see `split_workspace`, and a number."""
    outputs, sums, counters = _split(workspace, shape, prefill_workspace_bytes(shape, launch))
    return outputs, sums, counters, PREFILL_PLACES * launch.grid[0]
