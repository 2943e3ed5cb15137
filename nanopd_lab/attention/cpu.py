"""The CPU backend: our own C++ for decode tokens and storing, SDPA for long chunks.

Without a C++ compiler, `create_backend("auto")` falls back to the pure PyTorch backend, which is slower for
decode batches but otherwise the same.
"""

from __future__ import annotations

import ctypes

import torch

from nanopd_lab.attention.base import AttentionMetadata
from nanopd_lab.attention.torch_backend import attend_one, store_rows
from nanopd_lab.cpu import library

# Up to this many query tokens a sequence the streaming kernel wins; beyond, SDPA's blocked products do.
FEW_TOKENS = 8
MAX_HEAD_DIM = 512
MAX_GROUP = 64
MAX_BLOCK_SIZE = 256


class CpuBackend:
    """See `AttentionBackend`; float32 and bfloat16 on the CPU."""

    name = "cpu"

    def __init__(self) -> None:
        self._library = library.load()

    def store(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        if key.stride(2) != 1 or value.stride(2) != 1 or key.dtype != kv_layer.dtype:
            store_rows(key, value, kv_layer, slot_mapping)
            return
        size = key.element_size()
        self._library.paged_store(
            key.data_ptr(),
            value.data_ptr(),
            kv_layer.data_ptr(),
            slot_mapping.data_ptr(),
            key.shape[0],
            key.shape[1],
            key.shape[2] * size,
            kv_layer.shape[3],
            key.stride(0) * size,
            key.stride(1) * size,
            value.stride(0) * size,
            value.stride(1) * size,
            kv_layer.stride(0) * size,
            kv_layer.stride(1) * size,
        )

    def attend(
        self, query: torch.Tensor, kv_layer: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        query = query.contiguous()
        out = torch.empty_like(query)
        few = metadata.num_few(FEW_TOKENS) if self._can_stream(query, kv_layer) else 0
        if few:
            problem = library.AttentionProblem(
                query.data_ptr(),
                kv_layer.data_ptr(),
                out.data_ptr(),
                metadata.block_tables.data_ptr(),
                metadata.query_start.data_ptr(),
                metadata.context_lens.data_ptr(),
                kv_layer.stride(0),
                kv_layer.stride(1),
                few,
                metadata.block_tables.shape[1],
                query.shape[1],
                kv_layer.shape[2],
                query.shape[2],
                kv_layer.shape[3],
                scale,
            )
            self._library.paged_attend(ctypes.byref(problem), library.DTYPES[query.dtype])
        row = sum(metadata.query_lens_host[:few])
        for index in range(few, metadata.num_sequences):
            rows = slice(row, row + metadata.query_lens_host[index])
            out[rows] = attend_one(query[rows], kv_layer, metadata, index, scale)
            row = rows.stop
        return out

    @staticmethod
    def _can_stream(query: torch.Tensor, kv_layer: torch.Tensor) -> bool:
        return (
            query.dtype in library.DTYPES
            and query.shape[2] % 16 == 0
            and query.shape[2] <= MAX_HEAD_DIM
            and query.shape[1] // kv_layer.shape[2] <= MAX_GROUP
            and kv_layer.shape[3] <= MAX_BLOCK_SIZE
        )
