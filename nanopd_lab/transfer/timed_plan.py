"""What a transfer bench measures: pulls of so many tokens of a model's KV, between two devices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanopd_lab.kv.cache import KVShape
from nanopd_lab.transfer.base import Pool, Transport

LINK_BYTES = 300_000_000  # of a yardstick's copy: far more than any cache, and about 2,048 tokens of Qwen3-8B


def kv_shape(name: str, block_size: int = 16) -> KVShape:
    """KV of a named model in bf16.

    Raises:
        ValueError: unknown name.
    """
    from nanopd_lab.model.shapes import SHAPES

    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; choose from {', '.join(SHAPES)}")
    config = SHAPES[name]
    return KVShape(
        config["num_hidden_layers"],
        config["num_key_value_heads"],
        config["head_dim"],
        block_size,
        torch.bfloat16,
    )


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    shape: KVShape
    tokens: tuple[int, ...]
    source: torch.device
    target: torch.device
    rounds: int

    @property
    def num_blocks(self) -> int:
        """Of a pool: the longest pull, and enough for the yardsticks."""
        return max(-(-max(self.tokens) // self.shape.block_size), -(-LINK_BYTES // self.shape.block_bytes))

    def pool(self, transport: Transport, device: torch.device, seed: int) -> Pool:
        """Block b of the source's holds b everywhere, so that what arrives can be checked."""
        s = self.shape
        size = (self.num_blocks, s.num_layers, 2, s.num_kv_heads, s.block_size, s.head_dim)
        memory = transport.allocate(size, s.dtype, device)
        numbers = (seed + torch.arange(self.num_blocks)).to(torch.int16).to(device)
        halves = memory.view(self.num_blocks, -1).view(torch.int16)
        halves.copy_(numbers[:, None].expand_as(halves))
        if memory.is_cuda:
            torch.cuda.synchronize(device)
        return Pool(memory, transport.generations(self.num_blocks))
