"""The kernels as torch operators, `torch.ops.nanopd.*`: CUDA, CPU and fake implementations.

Registered through torch.library, so that torch.compile and CUDA graphs take them as they are. The CUDA
implementations read nothing back from the device. `paged_decode` and `paged_prefill` return new tensors; the
`workspace` they use is scratch: zeroed once (`make_workspace`), meaningless between calls, but not to be
shared by calls that may run at the same time on two streams.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from nanopd_lab.kernels import gpu, reference, validate
from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import (
    SPLIT_RUNGS,
    AttentionShape,
    best_rung,
    decode_launch,
    max_grid,
    move_launch,
    prefill_launch,
    prefill_workspace,
    split_workspace,
    store_launch,
    workspace_bytes,
)

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


def _limits(tensor: torch.Tensor) -> gpu.DeviceLimits:
    return gpu.limits_of(
        tensor.device.index if tensor.device.index is not None else torch.cuda.current_device()
    )


def make_workspace(shape: AttentionShape, device: torch.device | str) -> torch.Tensor:
    """Scratch memory for `paged_decode` and `paged_prefill`, zeroed. Make it once, before any graph is captured."""
    device = torch.device(device)
    if device.type != "cuda":
        return torch.zeros(0, dtype=torch.uint8, device=device)
    index = device.index if device.index is not None else torch.cuda.current_device()
    return torch.zeros(workspace_bytes(shape, gpu.limits_of(index)), dtype=torch.uint8, device=device)


# ---- CUDA -----------------------------------------------------------------------------------------------


def _kv_store_cuda(
    key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
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
    """Paged decode on a GPU, written to `out` (contiguous, the query's shape). See `paged_decode`."""
    shape = validate.check_attention(query, kv_layer, block_tables, context_lens)
    sequences = context_lens.shape[0]
    if query.shape[0] != sequences:
        raise KernelArgumentError(
            f"paged_decode takes one query row a sequence: {query.shape[0]} rows for {sequences} sequences"
        )
    if sequences == 0:
        return
    chosen = best_rung(shape) if rung == "auto" else rung
    limits = _limits(query)
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
    decode_into(out, query, kv_layer, block_tables, context_lens, workspace, scale, rung)
    return out


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
    launch = prefill_launch(shape, _limits(query))
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
    prefill_into(out, query, kv_layer, block_tables, context_lens, query_start, workspace, scale)
    return out


def _block_bytes(kv_cache: torch.Tensor) -> int:
    if not kv_cache.is_contiguous() or kv_cache.data_ptr() % 16:
        raise KernelArgumentError(
            "kv_cache must be the whole, contiguous block-major cache, 16-byte aligned; not one layer's view"
        )
    size = kv_cache.element_size() * (kv_cache.numel() // max(1, kv_cache.shape[0]))
    if size % 16:
        raise KernelArgumentError(f"a block of {size} bytes is not a multiple of 16 bytes")
    return size


def _reaches(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether a kernel on the target's device can read the source."""
    if source.device == target.device:
        return True
    return source.is_cuda and torch.cuda.can_device_access_peer(target.device, source.device)


def _move(
    source: torch.Tensor,
    from_ids: torch.Tensor | None,
    target: torch.Tensor,
    to_ids: torch.Tensor | None,
    count: int,
) -> None:
    size = _block_bytes(source)
    if size != _block_bytes(target) or source.dtype != target.dtype or not _reaches(target, source):
        raise KernelArgumentError(
            f"blocks must have the same size and type, on one device or one with access to the other: "
            f"{source.dtype} {list(source.shape)} on {source.device}, {target.dtype} {list(target.shape)} on "
            f"{target.device}"
        )
    for name, ids in (("from_ids", from_ids), ("to_ids", to_ids)):
        if ids is not None:
            validate.check_index(name, ids, torch.int64, 1, target.device)
            if ids.shape[0] != count:
                raise KernelArgumentError(f"{name} has {ids.shape[0]} entries for {count} blocks")
    pieces = size // 16
    for first in range(0, count, 65535):  # the grid's second dimension
        part = slice(first, min(count, first + 65535))
        args = [
            source if from_ids is not None else source[first:], ctypes.c_longlong(pieces),
            from_ids[part] if from_ids is not None else None,
            target if to_ids is not None else target[first:], ctypes.c_longlong(pieces),
            to_ids[part] if to_ids is not None else None, pieces,
        ]  # fmt: skip
        gpu.execute(move_launch(part.stop - first, size, _limits(target)), args, target.device)


def _copy_blocks_cuda(kv_cache: torch.Tensor, from_ids: torch.Tensor, to_ids: torch.Tensor) -> None:
    _move(kv_cache, from_ids, kv_cache, to_ids, from_ids.shape[0])


def _gather_blocks_cuda(kv_cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    out = kv_cache.new_empty((ids.shape[0], *kv_cache.shape[1:]))
    _move(kv_cache, ids, out, None, ids.shape[0])
    return out


def _scatter_blocks_cuda(kv_cache: torch.Tensor, ids: torch.Tensor, blocks: torch.Tensor) -> None:
    _move(blocks, None, kv_cache, ids, ids.shape[0])


def _pull_blocks_cuda(
    to_pool: torch.Tensor, to_ids: torch.Tensor, from_pool: torch.Tensor, from_ids: torch.Tensor
) -> None:
    with torch.cuda.device(to_pool.device):  # the launch goes to the current context
        _move(from_pool, from_ids, to_pool, to_ids, to_ids.shape[0])


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
    "kv_store": (_kv_store_cuda, reference.store, _nothing_fake),
    "paged_decode": (_paged_decode_cuda, _paged_decode_cpu, _attention_fake),
    "paged_prefill": (_paged_prefill_cuda, _paged_prefill_cpu, _attention_fake),
    "copy_blocks": (_copy_blocks_cuda, _copy_blocks_cpu, _nothing_fake),
    "gather_blocks": (_gather_blocks_cuda, _gather_blocks_cpu, _gather_fake),
    "scatter_blocks": (_scatter_blocks_cuda, _scatter_blocks_cpu, _nothing_fake),
    "pull_blocks": (_pull_blocks_cuda, _pull_blocks_cpu, _nothing_fake),
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


class Puller:
    """`pull_blocks` into one pool for those who pull often: nothing is checked, and nothing copied before the launch.

    300 MB from another H100 take 0.85 ms, of which every 8 µs on the host are 1 %. So what all launches have in common
    is prepared once.

    Args:
        to_pool: uint8 `[num_blocks, block_bytes]`, as in `pull_blocks`; to be kept by the caller
        stream: of its device
    """

    def __init__(self, to_pool: torch.Tensor, stream: torch.cuda.Stream) -> None:
        self._block_bytes, self._limits = to_pool.shape[1], _limits(to_pool)
        self._from_pool, self._from_ids, self._to_ids = (ctypes.c_void_p() for _ in range(3))
        pieces = self._block_bytes // 16
        args = [
            self._from_pool, ctypes.c_longlong(pieces), self._from_ids,
            ctypes.c_void_p(to_pool.data_ptr()), ctypes.c_longlong(pieces), self._to_ids, ctypes.c_int(pieces),
        ]  # fmt: skip
        launch = move_launch(1, self._block_bytes, self._limits)
        self._on_device = torch.cuda.device(to_pool.device)
        with self._on_device:
            kernel = gpu.load(launch, to_pool.device.index)
        self._launch = gpu.PreparedLaunch(kernel, (launch.threads, 1, 1), 0, args, stream.cuda_stream)

    def enqueue(self, from_pool: torch.Tensor, ids: torch.Tensor, count: int) -> None:
        """Pull `count` blocks of a pool like the own.

        ids: int64 in pinned memory of the host, where the kernel reads them: `count` of the own blocks, then `count`
            of the other pool's. Leave them as they are until the launch has ended.
        """
        self._from_pool.value = from_pool.data_ptr()
        self._to_ids.value = first = ids.data_ptr()
        self._from_ids.value = first + 8 * count
        with self._on_device:  # the launch goes to the current context
            self._launch.enqueue(move_launch(count, self._block_bytes, self._limits).grid)
