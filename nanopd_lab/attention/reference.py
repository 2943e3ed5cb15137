"""The oracle: dense attention, one sequence and one head at a time, in float64. Slow and plain on purpose."""

from __future__ import annotations

import torch

from nanopd_lab.attention.base import AttentionMetadata


def gather_sequence(
    kv_layer: torch.Tensor, block_table: torch.Tensor, context_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence's K and V out of its pages, each `[kv_heads, context_len, head_dim]`.

    Args:
        kv_layer: `[num_blocks, 2, kv_heads, block_size, head_dim]`
        block_table: block ids, at least ceil(context_len / block_size) of them
    """
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    pages = kv_layer[block_table[: -(-context_len // block_size)].long()]  # [blocks, 2, heads, size, dim]
    flat = pages.permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)
    return flat[0, :, :context_len], flat[1, :, :context_len]


class ReferenceBackend:
    """See `AttentionBackend`. Computes in float64 and rounds once, at the end."""

    name = "reference"

    def store(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        block_size = kv_layer.shape[3]
        for token, slot in enumerate(slot_mapping.tolist()):
            kv_layer[slot // block_size, 0, :, slot % block_size] = key[token]
            kv_layer[slot // block_size, 1, :, slot % block_size] = value[token]

    def attend(
        self, query: torch.Tensor, kv_layer: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        group = query.shape[1] // kv_layer.shape[2]
        row = 0
        for index, (length, context) in enumerate(
            zip(metadata.query_lens_host, metadata.context_lens_host, strict=True)
        ):
            keys, values = gather_sequence(kv_layer, metadata.block_tables[index], context)
            past = context - length
            for head in range(query.shape[1]):
                q = query[row : row + length, head].double()
                scores = scale * q @ keys[head // group].double().T  # [length, context]
                for i in range(length):
                    scores[i, past + i + 1 :] = float("-inf")
                out[row : row + length, head] = (scores.softmax(-1) @ values[head // group].double()).to(
                    out.dtype
                )
            row += length
        return out
