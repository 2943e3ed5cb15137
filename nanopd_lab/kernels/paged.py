"""The paged kernels on a GPU: KV store, decode, prefill. Arguments are checked, the launch is chosen, and sent off.

Nothing is read back from the device.
"""

from __future__ import annotations

import ctypes

import torch

from nanopd_lab.kernels import gpu, validate
from nanopd_lab.kernels.decode_launches import SPLIT_RUNGS, best_rung, decode_launch, max_grid
from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import AttentionShape, store_launch
from nanopd_lab.kernels.prefill_launches import prefill_launch
from nanopd_lab.kernels.workspace import prefill_workspace, split_workspace


def store(key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `ops.kv_store`."""
    validate.check_cache(kv_layer)
    validate.check_rows("key", key, kv_layer)
    validate.check_rows("value", value, kv_layer)
    validate.check_index("slot_mapping", slot_mapping, torch.int64, 1, kv_layer.device)
    tokens, kv_heads = slot_mapping.shape[0], kv_layer.shape[2]
    if key.shape != value.shape or key.shape[0] != tokens or key.shape[1] != kv_heads:
        raise KernelArgumentError(
            f"key {list(key.shape)} and value {list(value.shape)} must be [{tokens}, {kv_heads}, head_dim]"
        )
    if tokens == 0:
        return
    shape = AttentionShape(kv_layer.dtype, kv_heads, kv_heads, kv_layer.shape[4], kv_layer.shape[3])
    args = [
        kv_layer, ctypes.c_longlong(kv_layer.stride(0)), key, ctypes.c_longlong(key.stride(0)), value,
        ctypes.c_longlong(value.stride(0)), slot_mapping, tokens, kv_heads,
    ]  # fmt: skip
    gpu.execute(store_launch(shape, tokens), args, kv_layer.device)


def decode_into(
    out: torch.Tensor,
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
    rung: str = "auto",
) -> None:
    """Paged decode on a GPU, written to `out` (contiguous, the query's shape). See `ops.paged_decode`."""
    shape = validate.check_attention(query, kv_layer, block_tables, context_lens)
    sequences = context_lens.shape[0]
    if query.shape[0] != sequences:
        raise KernelArgumentError(
            f"paged_decode takes one query row a sequence: {query.shape[0]} rows for {sequences} sequences"
        )
    if sequences == 0:
        return
    chosen = best_rung(shape) if rung == "auto" else rung
    limits = gpu.limits_on(query.device)
    launch = decode_launch(chosen, shape, sequences, block_tables.shape[1] * shape.block_size, limits)
    args = [
        out,
        query,
        ctypes.c_longlong(query.stride(0)),
        kv_layer,
        ctypes.c_longlong(kv_layer.stride(0)),
        block_tables,
        int(block_tables.stride(0)),
        context_lens,
        shape.kv_heads,
        float(scale),
    ]
    if chosen in SPLIT_RUNGS:
        args += [sequences, *split_workspace(workspace, shape, max_grid(limits))]
    gpu.execute(launch, args, query.device)


def prefill_into(
    out: torch.Tensor,
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
) -> None:
    """Paged prefill on a GPU, written to the rows of `out` that `query_start` names. A sequence whose context
    is 0 is skipped: its rows stay as they are."""
    shape = validate.check_attention(query, kv_layer, block_tables, context_lens)
    validate.check_index("query_start", query_start, torch.int32, 1, query.device)
    sequences = context_lens.shape[0]
    if query_start.shape[0] != sequences + 1:
        raise KernelArgumentError(
            f"query_start must have {sequences + 1} entries for {sequences} sequences, "
            f"got {query_start.shape[0]}"
        )
    if query.shape[0] == 0 or sequences == 0:
        return
    launch = prefill_launch(shape, gpu.limits_on(query.device))
    args = [
        out,
        query,
        ctypes.c_longlong(query.stride(0)),
        kv_layer,
        ctypes.c_longlong(kv_layer.stride(0)),
        block_tables,
        int(block_tables.stride(0)),
        context_lens,
        query_start,
        shape.kv_heads,
        float(scale),
        sequences,
        *prefill_workspace(workspace, shape, launch),
    ]
    gpu.execute(launch, args, query.device)
