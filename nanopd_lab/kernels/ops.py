"""The kernels as torch operators, `torch.ops.nanopd.*`: CUDA, CPU and fake implementations.

Registered through torch.library, so that torch.compile and CUDA graphs take them as they are. The CUDA
implementations read nothing back from the device. `paged_decode` and `paged_prefill` return new tensors; the
`workspace` they use is scratch: zeroed once (`make_workspace`), meaningless between calls, but not to be
shared by calls that may run at the same time on two streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nanopd_lab.kernels import gpu, moves, paged, reference, validate
from nanopd_lab.kernels.launches import AttentionShape
from nanopd_lab.kernels.workspace import workspace_bytes

_library = torch.library.Library("nanopd", "DEF")
_library.define("kv_store(Tensor key, Tensor value, Tensor(a!) kv_layer, Tensor slot_mapping) -> ()")
_library.define(
    "paged_decode(Tensor query, Tensor kv_layer, Tensor block_tables, Tensor context_lens, Tensor workspace, "
    "float scale, str rung='auto') -> Tensor"
)
_library.define(
    "paged_prefill(Tensor query, Tensor kv_layer, Tensor block_tables, Tensor context_lens, "
    "Tensor query_start, Tensor workspace, float scale) -> Tensor"
)
_library.define("copy_blocks(Tensor(a!) kv_cache, Tensor from_ids, Tensor to_ids) -> ()")
_library.define("gather_blocks(Tensor kv_cache, Tensor ids) -> Tensor")
_library.define("scatter_blocks(Tensor(a!) kv_cache, Tensor ids, Tensor blocks) -> ()")
_library.define("pull_blocks(Tensor(a!) to_pool, Tensor to_ids, Tensor from_pool, Tensor from_ids) -> ()")


def make_workspace(shape: AttentionShape, device: torch.device | str) -> torch.Tensor:
    """Scratch memory for `paged_decode` and `paged_prefill`, zeroed. Make it once, before any graph is captured."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.zeros(0, dtype=torch.uint8, device=device)
    return torch.zeros(workspace_bytes(shape, gpu.limits_on(device)), dtype=torch.uint8, device=device)


# ---- CUDA: see `paged` and `moves` ----------------------------------------------------------------------------


def _paged_decode_cuda(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
    rung: str = "auto",
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    paged.decode_into(out, query, kv_layer, block_tables, context_lens, workspace, scale, rung)
    return out


def _paged_prefill_cuda(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    paged.prefill_into(out, query, kv_layer, block_tables, context_lens, query_start, workspace, scale)
    return out


# ---- CPU: the reference, in fp32 ------------------------------------------------------------------------


def _paged_decode_cpu(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
    rung: str = "auto",
) -> torch.Tensor:
    validate.check_attention(query, kv_layer, block_tables, context_lens)
    starts = torch.arange(query.shape[0] + 1, dtype=torch.int32)
    out = reference.attend(query, kv_layer, block_tables, context_lens, starts, scale, torch.float32)
    return out.to(query.dtype)


def _paged_prefill_cpu(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    validate.check_attention(query, kv_layer, block_tables, context_lens)
    out = reference.attend(query, kv_layer, block_tables, context_lens, query_start, scale, torch.float32)
    return out.to(query.dtype)


def _copy_blocks_cpu(kv_cache: torch.Tensor, from_ids: torch.Tensor, to_ids: torch.Tensor) -> None:
    kv_cache[to_ids] = kv_cache[from_ids]


def _gather_blocks_cpu(kv_cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return kv_cache[ids]


def _scatter_blocks_cpu(kv_cache: torch.Tensor, ids: torch.Tensor, blocks: torch.Tensor) -> None:
    kv_cache[ids] = blocks


def _pull_blocks_cpu(
    to_pool: torch.Tensor, to_ids: torch.Tensor, from_pool: torch.Tensor, from_ids: torch.Tensor
) -> None:
    to_pool[to_ids] = from_pool[from_ids]


# ---- fake: shapes only, for torch.compile ----------------------------------------------------------------


def _attention_fake(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _gather_fake(kv_cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return kv_cache.new_empty((ids.shape[0], *kv_cache.shape[1:]))


def _nothing_fake(*_: object, **__: object) -> None:
    return None


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "kv_store": (paged.store, reference.store, _nothing_fake),
    "paged_decode": (_paged_decode_cuda, _paged_decode_cpu, _attention_fake),
    "paged_prefill": (_paged_prefill_cuda, _paged_prefill_cpu, _attention_fake),
    "copy_blocks": (moves.copy_blocks, _copy_blocks_cpu, _nothing_fake),
    "gather_blocks": (moves.gather_blocks, _gather_blocks_cpu, _gather_fake),
    "scatter_blocks": (moves.scatter_blocks, _scatter_blocks_cpu, _nothing_fake),
    "pull_blocks": (moves.pull_blocks, _pull_blocks_cpu, _nothing_fake),
}
for _name, (_cuda, _cpu, _fake) in _IMPLEMENTATIONS.items():
    _library.impl(_name, _cuda, "CUDA")
    _library.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"nanopd::{_name}", _fake, lib=_library)


# ---- the same, checked: what everything but the engine's hot loop calls -----------------------------------


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    validate_values: bool = True,
) -> None:
    """Write K and V ([T, kv_heads, head_dim]) to the slots (int64 [T]; negative is padding)."""
    if validate_values:
        validate.check_cache(kv_layer)
        validate.check_slots(kv_layer, slot_mapping)
    torch.ops.nanopd.kv_store(key, value, kv_layer, slot_mapping)


def paged_decode(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
    rung: str = "auto",
    validate_values: bool = True,
) -> torch.Tensor:
    """Attention of one query token a sequence ([S, heads, head_dim]) over its pages, by one rung of the
    ladder.

    Raises KernelArgumentError for whatever doesn't fit; with `validate_values` also for context lengths and
    block ids out of range, at the price of waiting for the device.
    """
    if validate_values:
        validate.check_cache(kv_layer)
        validate.check_values(kv_layer, block_tables, context_lens)
    return torch.ops.nanopd.paged_decode(query, kv_layer, block_tables, context_lens, workspace, scale, rung)


def paged_prefill(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    workspace: torch.Tensor,
    scale: float,
    validate_values: bool = True,
) -> torch.Tensor:
    """Causal attention of a flat batch ([T, heads, head_dim]) over pages; any mixture of query lengths."""
    if validate_values:
        validate.check_cache(kv_layer)
        validate.check_values(kv_layer, block_tables, context_lens)
        validate.check_query_start(query, query_start, context_lens)
    return torch.ops.nanopd.paged_prefill(
        query, kv_layer, block_tables, context_lens, query_start, workspace, scale
    )


def copy_blocks(
    kv_cache: torch.Tensor, from_ids: torch.Tensor, to_ids: torch.Tensor, validate_values: bool = True
) -> None:
    """Copy whole blocks within a cache (copy-on-write): block from_ids[i] onto to_ids[i], all layers."""
    if validate_values:
        validate.check_block_ids("from_ids", from_ids, kv_cache)
        validate.check_block_ids("to_ids", to_ids, kv_cache)
    torch.ops.nanopd.copy_blocks(kv_cache, from_ids, to_ids)


def gather_blocks(kv_cache: torch.Tensor, ids: torch.Tensor, validate_values: bool = True) -> torch.Tensor:
    """Blocks `ids` of the cache as one contiguous tensor [len(ids), …], for a transfer."""
    if validate_values:
        validate.check_block_ids("ids", ids, kv_cache)
    return torch.ops.nanopd.gather_blocks(kv_cache, ids)


def scatter_blocks(
    kv_cache: torch.Tensor, ids: torch.Tensor, blocks: torch.Tensor, validate_values: bool = True
) -> None:
    """The reverse of `gather_blocks`: write received blocks to their places."""
    if validate_values:
        validate.check_block_ids("ids", ids, kv_cache)
    torch.ops.nanopd.scatter_blocks(kv_cache, ids, blocks)


def pull_blocks(
    to_pool: torch.Tensor,
    to_ids: torch.Tensor,
    from_pool: torch.Tensor,
    from_ids: torch.Tensor,
    validate_values: bool = True,
) -> None:
    """Copy block from_ids[i] of one pool onto block to_ids[i] of another, all in one launch.

    Both pools `[num_blocks, ...]` with blocks of the same size and type, ids int64 on the target's device. The pools
    may be on different GPUs if the target's has access to the other's memory, and that access is switched on: torch
    does so on its first copy between the two (`nanopd_lab.transfer.device_memory.enable_peer_access`).
    """
    if validate_values:
        validate.check_block_ids("to_ids", to_ids, to_pool)
        validate.check_block_ids("from_ids", from_ids, from_pool)
    torch.ops.nanopd.pull_blocks(to_pool, to_ids, from_pool, from_ids)
