"""Decode attention by the CUDA kernels, emulated on a CPU. Slow on purpose: to see a kernel at work in a real model.

`headers` puts other texts in place of headers of `cuda/` (see `kernels.sources.replaced`): that is how a function
from a notebook cell comes to write a model's answer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nanopd_lab.attention.base import AttentionMetadata
from nanopd_lab.attention.torch_backend import TorchBackend
from nanopd_lab.kernels import emulated
from nanopd_lab.kernels.decode_launches import SplitTuning

ONE_WARP = SplitTuning(warps=1, warp_tokens=16, stages=2)  # fewer idle threads to emulate for short contexts


class EmulatedBackend(TorchBackend):
    """Sequences with one new token go through `rung` in the emulator, prompts through PyTorch. CPU tensors only."""

    name = "emulated"

    def __init__(self, rung: str = "split", headers: Mapping[str, str] | None = None) -> None:
        self.rung, self.headers, self.launches = rung, dict(headers or {}), 0

    def attend(
        self, query: torch.Tensor, kv_layer: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        decodes = metadata.num_decodes
        if decodes < metadata.num_sequences:  # some have a prompt to read: PyTorch does them all
            return super().attend(query, kv_layer, metadata, scale)
        tables, contexts = metadata.block_tables[:decodes], metadata.context_lens[:decodes]
        out, _ = emulated.paged_decode(
            self.rung, query, kv_layer, tables, contexts, scale, headers=self.headers
        )
        self.launches += 1
        return out
