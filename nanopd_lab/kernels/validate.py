"""Host-side checks of what goes into a kernel: every mistake gets a clear error before anything is launched.

Two levels. Shapes, types, strides and devices are host-known, cost a microsecond or two and are always
checked. *Values* that live on a device (block ids, slots, context lengths) can only be checked by reading
them back, which
waits for the device: `check_values` does it, and is what `validate=True` means. The engine's hot loop builds
these tensors from its own allocator and switches it off; every other caller keeps it on.
"""

from __future__ import annotations

import torch

from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import AttentionShape


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelArgumentError(message)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def check_index(name: str, tensor: torch.Tensor, dtype: torch.dtype, dims: int, device: torch.device) -> None:
    """An index tensor: its type, number of dimensions, device, and unit stride in the last dimension."""
    _require(
        tensor.dtype == dtype and tensor.dim() == dims and tensor.device == device,
        f"{name} must be {dtype} with {dims} dimension(s) on {device}, got {_describe(tensor)}",
    )
    _require(
        tensor.shape[-1] <= 1 or tensor.stride(-1) == 1,
        f"{name} must be contiguous in its last dimension; call .contiguous()",
    )


def check_cache(kv_layer: torch.Tensor) -> None:
    """One layer's view of the block-major cache: five dimensions, contiguous inside a block, 16-byte
    aligned."""
    _require(
        kv_layer.dim() == 5 and kv_layer.shape[1] == 2,
        f"kv_layer must be [num_blocks, 2, kv_heads, block_size, head_dim], got {_describe(kv_layer)}",
    )
    _, _, kv_heads, block_size, head_dim = kv_layer.shape
    inside = (kv_heads * block_size * head_dim, block_size * head_dim, head_dim, 1)
    _require(
        kv_layer.stride()[1:] == inside,
        f"kv_layer must be contiguous inside a block (strides (…, {inside}), got {kv_layer.stride()}); take "
        "kv_cache[:, layer] of a contiguous [num_blocks, layers, 2, kv_heads, block_size, head_dim]",
    )
    _require(
        kv_layer.data_ptr() % 16 == 0 and kv_layer.stride(0) * kv_layer.element_size() % 16 == 0,
        "kv_layer's blocks must begin at multiples of 16 bytes",
    )


def check_rows(name: str, rows: torch.Tensor, kv_layer: torch.Tensor) -> None:
    """Query, K or V: [tokens, heads, head_dim], rows contiguous inside (they may be slices of a wider
    product)."""
    head_dim = kv_layer.shape[4]
    _require(
        rows.dim() == 3 and rows.shape[2] == head_dim,
        f"{name} must be [tokens, heads, head_dim={head_dim}], got {_describe(rows)}",
    )
    _require(
        rows.dtype == kv_layer.dtype and rows.device == kv_layer.device,
        f"{name} is {_describe(rows)} but the cache is {kv_layer.dtype} on {kv_layer.device}; "
        "convert one of them",
    )
    _require(
        rows.stride(2) == 1 and (rows.shape[1] == 1 or rows.stride(1) == head_dim),
        f"{name} must be contiguous within a token, got strides {rows.stride()}; call .contiguous()",
    )
    _require(
        rows.data_ptr() % 16 == 0 and rows.stride(0) * rows.element_size() % 16 == 0,
        f"{name}'s rows must begin at multiples of 16 bytes; call .contiguous()",
    )


def shape_of(query: torch.Tensor, kv_layer: torch.Tensor) -> AttentionShape:
    """The checked kernel constants of a query and a cache."""
    return AttentionShape(
        kv_layer.dtype, query.shape[1], kv_layer.shape[2], kv_layer.shape[4], kv_layer.shape[3]
    )


def check_attention(
    query: torch.Tensor, kv_layer: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor
) -> AttentionShape:
    """All that is host-known of an attention call. Returns the kernel constants."""
    check_cache(kv_layer)
    check_rows("query", query, kv_layer)
    check_index("block_tables", block_tables, torch.int32, 2, kv_layer.device)
    check_index("context_lens", context_lens, torch.int32, 1, kv_layer.device)
    _require(
        block_tables.shape[0] == context_lens.shape[0],
        f"block_tables has {block_tables.shape[0]} rows for {context_lens.shape[0]} context_lens",
    )
    return shape_of(query, kv_layer)


def check_values(kv_layer: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor) -> None:
    """Context lengths fit in the tables, and every block id that they use exists. Waits for the device."""
    num_blocks, block_size = kv_layer.shape[0], kv_layer.shape[3]
    contexts = context_lens.cpu().long()
    width = block_tables.shape[1]
    if contexts.numel() == 0:
        return
    _require(
        int(contexts.min()) >= 0 and int(contexts.max()) <= width * block_size,
        f"context_lens reach from {int(contexts.min())} to {int(contexts.max())}; allowed are "
        f"0 to {width * block_size} ({width} blocks of {block_size} in block_tables)",
    )
    used = torch.arange(width) * block_size < contexts[:, None]
    ids = block_tables.cpu()
    wrong = used & ((ids < 0) | (ids >= num_blocks))
    if bool(wrong.any()):
        s, b = (int(x) for x in wrong.nonzero()[0])
        raise KernelArgumentError(
            f"block_tables[{s}, {b}] = {int(ids[s, b])}: block ids of this cache are 0 to {num_blocks - 1}"
        )


def check_query_start(query: torch.Tensor, query_start: torch.Tensor, context_lens: torch.Tensor) -> None:
    """query_start rises within the query's rows, and no query is longer than its context, if it has one. Waits."""
    starts, contexts = query_start.cpu().long(), context_lens.cpu().long()
    lengths = starts[1:] - starts[:-1]
    _require(
        int(starts[0]) >= 0 and int(starts[-1]) <= query.shape[0] and bool((lengths >= 0).all()),
        f"query_start must rise to at most {query.shape[0]} rows, got {starts.tolist()[:8]}…",
    )
    _require(
        bool(((lengths <= contexts) | (contexts == 0)).all()),
        "a sequence has more query tokens than context; context_lens counts them too",
    )


def check_slots(kv_layer: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Slots are inside the cache (negative ones are padding). Waits for the device."""
    slots = kv_layer.shape[0] * kv_layer.shape[3]
    if slot_mapping.numel():
        largest = int(slot_mapping.max())
        _require(largest < slots, f"slot_mapping holds {largest}; the cache has slots 0 to {slots - 1}")


def check_block_ids(name: str, ids: torch.Tensor, kv_cache: torch.Tensor) -> None:
    """Ids are blocks of the cache. Waits for the device."""
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        _require(
            low >= 0 and high < kv_cache.shape[0],
            f"{name} reach from {low} to {high}; block ids of this cache are 0 to {kv_cache.shape[0] - 1}",
        )
