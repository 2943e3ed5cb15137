"""Which tokens top_p keeps, found on the GPU without sorting and without the host."""

from __future__ import annotations

import torch

from nanopd_lab.kernels import gpu
from nanopd_lab.kernels.launches import top_p_launch


def top_p_threshold(logits: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[R, 1]`: the largest x such that tokens with logits >= x weigh at least `target`; -inf if all weigh less.

    Args:
        logits: `[R, vocab]` float32, at most 0
        weights: `[R, vocab]` float32, at least 0
        target: `[R, 1]` float64, more than 0
    """
    rows, vocab = logits.shape
    out = torch.empty(rows, 1, dtype=torch.float32, device=logits.device)
    args = [out, logits.contiguous(), weights.contiguous(), target.contiguous(), vocab]
    gpu.execute(top_p_launch(rows), args, logits.device)
    return out
