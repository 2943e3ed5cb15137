"""The hand-written CUDA kernels as an attention backend.

Decode steps go through the best rung of the ladder (`kernels.launches.best_rung`), everything else through
the paged prefill kernel, except where PyTorch's own kernels are faster: a query of LONG_QUERY tokens or more
(compute-bound, and cuDNN or FlashAttention use Hopper's wgmma there, which our mma.sync kernel doesn't: see
the prefill rows of data/recorded/kernels-*.json) and fp32 gather their pages and call SDPA, one sequence at a
time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from nanopd_lab.attention.base import AttentionMetadata
from nanopd_lab.kernels import ops, reference, validate
from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import AttentionShape
from nanopd_lab.kv.cache import KVShape

LONG_QUERY = 512


def sdpa_causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """SDPA in which the queries are the last tokens of the keys; [1, heads, tokens, head_dim] each."""
    if query.shape[2] == keys.shape[2]:
        return F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
    mask = causal_lower_right(query.shape[2], keys.shape[2])
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)


class CudaBackend:
    """See `AttentionBackend`. Owns the decode kernels' workspace, so one instance serves one stream at a
    time.

    validate_values: also check block ids, slots and lengths against the cache before each launch. That waits
    for the device, so the engine leaves it off: its tables come from its own allocator.
    """

    name = "cuda"

    def __init__(self, validate_values: bool = False) -> None:
        self.validate_values = validate_values
        self._workspace: torch.Tensor | None = None

    @staticmethod
    def check(shape: KVShape, num_heads: int) -> None:
        """Raise KernelArgumentError (a ValueError) unless the kernels support this cache and head count."""
        AttentionShape(shape.dtype, num_heads, shape.num_kv_heads, shape.head_dim, shape.block_size)

    def _workspace_for(self, query: torch.Tensor, kv_layer: torch.Tensor) -> torch.Tensor:
        if self._workspace is None or self._workspace.device != query.device:
            if query.is_cuda and torch.cuda.is_current_stream_capturing():
                raise KernelArgumentError(
                    "the first call of the CUDA backend allocates its workspace and must come before a graph "
                    "capture; run the batch once outside it"
                )
            self._workspace = ops.make_workspace(validate.shape_of(query, kv_layer), query.device)
        return self._workspace

    def store(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        ops.kv_store(key, value, kv_layer, slot_mapping, self.validate_values)

    def attend(
        self, query: torch.Tensor, kv_layer: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        tables, contexts = metadata.block_tables, metadata.context_lens
        decodes, sequences = metadata.num_decodes, metadata.num_sequences
        paged = sequences
        if decodes < sequences:
            paged = decodes if kv_layer.dtype == torch.float32 else metadata.num_few(LONG_QUERY - 1)
        if decodes == sequences:
            workspace = self._workspace_for(query, kv_layer)
            return ops.paged_decode(
                query, kv_layer, tables, contexts, workspace, scale, validate_values=self.validate_values
            )
        if decodes < paged:
            # query_start is absolute, so the kernel fills these sequences' rows of a whole output.
            out = ops.paged_prefill(
                query,
                kv_layer,
                tables[decodes:paged],
                contexts[decodes:paged],
                metadata.query_start[decodes : paged + 1],
                max(metadata.query_lens_host[decodes:paged]),
                scale,
                self.validate_values,
            )
        else:
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if decodes:
            out[:decodes] = ops.paged_decode(
                query[:decodes],
                kv_layer,
                tables[:decodes],
                contexts[:decodes],
                self._workspace_for(query, kv_layer),
                scale,
                validate_values=self.validate_values,
            )
        first = sum(metadata.query_lens_host[:paged])
        for s in range(paged, sequences):
            length, context = metadata.query_lens_host[s], metadata.context_lens_host[s]
            rows = slice(first, first + length)
            keys, values = reference.pages_of(kv_layer, tables[s], context)
            found = sdpa_causal(query[rows].transpose(0, 1)[None], keys[None], values[None], scale)
            out[rows] = found[0].transpose(0, 1)
            first += length
        return out
