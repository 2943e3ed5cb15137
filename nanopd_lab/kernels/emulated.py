"""The package's own kernels, run in the emulator on CPU tensors: the same launches as on a GPU, other
machinery.

For the tests, `kernels check` and the notebook; not for speed. Every function takes `instrument` (watch every
access, count, and report faults) and returns the result with the `RunResult` that holds the counters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nanopd_lab.kernels import validate
from nanopd_lab.kernels.decode_launches import SPLIT_RUNGS, SplitTuning, decode_launch
from nanopd_lab.kernels.launches import (
    AttentionShape,
    DeviceLimits,
    Launch,
    move_launch,
    store_launch,
    top_p_launch,
)
from nanopd_lab.kernels.prefill_launches import prefill_launch
from nanopd_lab.kernels.product_launches import RowsTuning, TileTuning, few_rows_launch, some_rows_launch
from nanopd_lab.kernels.report import RunResult
from nanopd_lab.kernels.run import run
from nanopd_lab.kernels.sources import with_headers
from nanopd_lab.kernels.workspace import (
    decode_workspace_bytes,
    prefill_workspace,
    prefill_workspace_bytes,
    split_workspace,
)

LIMITS = DeviceLimits(multiprocessors=2)
SMALL_TILES = TileTuning(64, 3, 1)


def execute(
    launch: Launch,
    args: list[Any],
    instrument: bool,
    headers: Mapping[str, str] | None = None,
    device: str = "emulator",
    max_steps: int = 2_000_000_000,
) -> RunResult:
    """Run one launch. `headers` replaces headers of `cuda/` by name (see `sources.with_headers`)."""
    return run(
        with_headers(launch.source, headers or {}, launch.file),
        launch.kernel,
        launch.grid,
        launch.threads,
        args,
        shared_bytes=launch.shared_bytes,
        device=device,
        defines=launch.defines,
        instrument=instrument,
        max_steps=max_steps,
        name=launch.file,
    )


def paged_decode(
    rung: str,
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    instrument: bool = False,
    blocks: int = 5,
    tuning: SplitTuning | None = None,
    headers: Mapping[str, str] | None = None,
    device: str = "emulator",
    max_steps: int = 2_000_000_000,
) -> tuple[torch.Tensor, RunResult]:
    """One rung of the decode ladder; `blocks` is the grid of the split rungs.

    `headers`: see `execute`. `device="cuda"` compiles and launches the same on a GPU, copying the tensors there
    and back.
    """
    shape = validate.check_attention(query, kv_layer, block_tables, context_lens)
    validate.check_values(kv_layer, block_tables, context_lens)
    sequences = context_lens.shape[0]
    longest = int(context_lens.max())
    launch = decode_launch(rung, shape, sequences, longest, tuning=tuning, blocks=blocks)
    out = torch.full(query.shape, float("nan")).to(query.dtype)  # what stays unwritten is seen
    args: list[Any] = [
        out, query, query.stride(0), kv_layer, kv_layer.stride(0), block_tables, block_tables.stride(0),
        context_lens, shape.kv_heads, float(scale),
    ]  # fmt: skip
    workspace = torch.zeros(decode_workspace_bytes(shape, blocks), dtype=torch.uint8)
    if rung in SPLIT_RUNGS:
        partial, sums, counters = split_workspace(workspace, shape, blocks)
        partial.fill_(float("nan"))
        sums.fill_(float("nan"))
        args += [sequences, partial, sums, counters]
        result = execute(launch, args, instrument, headers, device, max_steps)
        assert int(counters.abs().max()) == 0, "counters must be zero again after a launch"
        return out, result
    return out, execute(launch, args, instrument, headers, device, max_steps)


def paged_prefill(
    query: torch.Tensor,
    kv_layer: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    query_start: torch.Tensor,
    scale: float,
    instrument: bool = False,
    warps: int = 8,
    blocks: int = 5,
) -> tuple[torch.Tensor, RunResult]:
    """Causal attention of a flat batch over pages; `blocks` is the grid."""
    shape = validate.check_attention(query, kv_layer, block_tables, context_lens)
    validate.check_values(kv_layer, block_tables, context_lens)
    validate.check_query_start(query, query_start, context_lens)
    launch = prefill_launch(shape, warps=warps, blocks=blocks)
    workspace = torch.zeros(prefill_workspace_bytes(shape, launch), dtype=torch.uint8)
    partial, sums, counters, places = prefill_workspace(workspace, shape, launch)
    partial.fill_(float("nan"))
    sums.fill_(float("nan"))
    out = torch.full(query.shape, float("nan")).to(query.dtype)
    args = [
        out, query, query.stride(0), kv_layer, kv_layer.stride(0), block_tables, block_tables.stride(0),
        context_lens, query_start, shape.kv_heads, float(scale), context_lens.shape[0], partial, sums, counters, places,
    ]  # fmt: skip
    result = execute(launch, args, instrument)
    assert int(counters.abs().max()) == 0, "counters must be zero again after a launch"
    return out, result


def kv_store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    instrument: bool = False,
) -> RunResult:
    """Write K and V rows to their slots, in place."""
    validate.check_cache(kv_layer)
    validate.check_rows("key", key, kv_layer)
    validate.check_rows("value", value, kv_layer)
    validate.check_slots(kv_layer, slot_mapping)
    kv_heads = kv_layer.shape[2]
    shape = AttentionShape(kv_layer.dtype, kv_heads, kv_heads, kv_layer.shape[4], kv_layer.shape[3])
    args = [
        kv_layer,
        kv_layer.stride(0),
        key,
        key.stride(0),
        value,
        value.stride(0),
        slot_mapping,
        key.shape[0],
        kv_heads,
    ]
    return execute(store_launch(shape, key.shape[0]), args, instrument)


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    instrument: bool = False,
    tuning: RowsTuning | None = None,
) -> tuple[torch.Tensor, RunResult]:
    """`x [rows, k]` times the transpose of `weight [n, k]`, plus `residual [rows, n]`."""
    (rows, k), n = x.shape, weight.shape[0]
    out = torch.full((rows, n), float("nan")).to(x.dtype)
    none = torch.zeros(0, dtype=x.dtype)  # an empty array is a null pointer
    add, stride = (none, 0) if residual is None else (residual, residual.stride(0))
    args = [out, n, x, x.stride(0), weight, add, stride, rows, k]
    return out, execute(few_rows_launch(x.dtype, rows, n, k, tuning), args, instrument)


def some_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    instrument: bool = False,
    tuning: TileTuning = SMALL_TILES,
) -> tuple[torch.Tensor, RunResult]:
    """As `few_rows`, by `cuda/some_rows.cu`, a block a tile: the emulator has no clusters."""
    (rows, k), n = x.shape, weight.shape[0]
    out = torch.full((rows, n), float("nan")).to(x.dtype)
    none = torch.zeros(0, dtype=x.dtype)
    add, stride = (none, 0) if residual is None else (residual, residual.stride(0))
    args = [out, n, x, x.stride(0), weight, add, stride, rows, n, k]
    return out, execute(some_rows_launch(x.dtype, rows, n, k, LIMITS, tuning), args, instrument)


def top_p_threshold(
    logits: torch.Tensor,
    weights: torch.Tensor,
    target: torch.Tensor,
    instrument: bool = False,
    warps: int = 4,
) -> tuple[torch.Tensor, RunResult]:
    """See `selection.top_p_threshold`."""
    rows, vocab = logits.shape
    out = torch.full((rows, 1), float("nan"))
    args = [out, logits, weights, target, vocab]
    return out, execute(top_p_launch(rows, warps), args, instrument)


def move_blocks(
    source: torch.Tensor,
    from_ids: torch.Tensor | None,
    target: torch.Tensor,
    to_ids: torch.Tensor | None,
    count: int,
    instrument: bool = False,
) -> RunResult:
    """Copy, gather or scatter whole blocks (see `cuda/move_blocks.cu`)."""
    size = source.element_size() * source[0].numel()
    nothing = torch.zeros(0, dtype=torch.int64)
    args = [
        source, size // 16, nothing if from_ids is None else from_ids, target, size // 16,
        nothing if to_ids is None else to_ids, size // 16,
    ]  # fmt: skip
    return execute(move_launch(count, size, LIMITS), args, instrument)
