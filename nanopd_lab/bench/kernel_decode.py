"""Decode attention of a batch over pages: every rung of the ladder, PyTorch's SDPA, and FlashInfer where it is
installed, each as a part of the memory roof."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nanopd_lab.bench.kernel_timer import Timer, summary
from nanopd_lab.kernels import ops, reference
from nanopd_lab.kernels.launches import AttentionShape
from nanopd_lab.kernels.reference import TOLERANCES

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16  # of Qwen3-8B


@dataclass(frozen=True)
class DecodeProblem:
    """Tensors of one decode batch over a block-major cache of one layer's worth of random blocks."""

    name: str
    query: torch.Tensor
    kv_layer: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    contexts: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """K and V that must be read, each once."""
        _, _, kv_heads, _, head_dim = self.kv_layer.shape
        return sum(self.contexts) * 2 * kv_heads * head_dim * self.kv_layer.element_size()


def decode_problem(
    name: str, contexts: Sequence[int], dtype: torch.dtype = torch.bfloat16, layers: int = 2, seed: int = 0
) -> DecodeProblem:
    """A batch with these context lengths; its blocks lie scattered over the pool. `layers` makes the view
    strided."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    width = -(-max(contexts) // BLOCK_SIZE)
    counts = [-(-c // BLOCK_SIZE) for c in contexts]
    total = sum(counts)
    shape = (total, layers, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    cache = torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)
    order = torch.randperm(total, generator=generator, device="cuda").int()
    tables = torch.zeros(len(contexts), width, dtype=torch.int32, device="cuda")
    first = 0
    for s, count in enumerate(counts):
        tables[s, :count] = order[first : first + count]
        first += count
    query = torch.randn(len(contexts), HEADS, HEAD_DIM, dtype=dtype, device="cuda", generator=generator)
    lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return DecodeProblem(name, query, cache[:, layers - 1], tables, lens, tuple(contexts))


def ragged_contexts(count: int = 128, low: int = 64, high: int = 32768, seed: int = 0) -> tuple[int, ...]:
    """Log-normal context lengths, most of them short and a few very long, clipped to [low, high]."""
    generator = torch.Generator().manual_seed(seed)
    middle, spread = math.log(1200.0), 1.25
    drawn = (
        torch.exp(middle + spread * torch.randn(count, generator=generator)).clamp(low, high).int().tolist()
    )
    drawn[0] = high  # the range's end is always there
    return tuple(drawn)


def sdpa_candidate(problem: DecodeProblem) -> Callable[[], torch.Tensor] | None:
    """PyTorch's SDPA over contiguous K and V of equal length: no paging, no raggedness; what it costs at
    best."""
    if len(set(problem.contexts)) > 1:
        return None
    count, length = len(problem.contexts), problem.contexts[0]
    k = torch.randn(count, KV_HEADS, length, HEAD_DIM, dtype=problem.query.dtype, device="cuda")
    v = torch.randn_like(k)
    q = problem.query[:, :, None]
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def flashinfer_candidates(problem: DecodeProblem) -> dict[str, Callable[[], torch.Tensor]]:
    """FlashInfer's paged decode with CUDA cores and with tensor cores, planned outside the timing; {} if not
    installed."""
    try:
        flashinfer = importlib.import_module("flashinfer")
    except ImportError:
        return {}
    pages = problem.kv_layer.transpose(
        2, 3
    ).contiguous()  # its NHD layout: [blocks, 2, block_size, kv_heads, head_dim]
    counts = [-(-c // BLOCK_SIZE) for c in problem.contexts]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    ids = torch.cat([problem.block_tables[s, :n] for s, n in enumerate(counts)])
    last = torch.tensor(
        [(c - 1) % BLOCK_SIZE + 1 for c in problem.contexts], dtype=torch.int32, device="cuda"
    )
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, tensor_cores in (("flashinfer", False), ("flashinfer-tc", True)):
        space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=tensor_cores)
        wrapper.plan(
            starts, ids, last, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, q_data_type=problem.query.dtype,
            kv_data_type=problem.query.dtype,
        )  # fmt: skip
        found[name] = lambda wrapper=wrapper: wrapper.run(problem.query, pages)  # type: ignore[misc]
    return found


def bench_decode(
    timer: Timer,
    problem: DecodeProblem,
    read_gb_s: float,
    rungs: Sequence[str],
    rounds: int,
    peers: bool = True,
) -> dict[str, Any]:
    """All rungs and peers on one batch; each output is first checked against float64."""
    scale = HEAD_DIM**-0.5
    shape = AttentionShape(problem.query.dtype, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    workspace = ops.make_workspace(shape, "cuda")
    starts = torch.arange(len(problem.contexts) + 1, dtype=torch.int32, device="cuda")
    args = (problem.query, problem.kv_layer, problem.block_tables, problem.context_lens)
    wanted = reference.attend(*args, starts, scale)
    candidates: dict[str, Callable[[], Any]] = {
        rung: lambda rung=rung: torch.ops.nanopd.paged_decode(*args, workspace, scale, rung)  # type: ignore[misc]
        for rung in rungs
    }
    if peers:
        candidates.update(flashinfer_candidates(problem))
    errors = {name: reference.relative_error(run(), wanted) for name, run in candidates.items()}
    for name, error in errors.items():
        if not error <= TOLERANCES[problem.query.dtype]:
            raise AssertionError(f"{name} is wrong on {problem.name}: relative error {error:.2e}")
    sdpa = sdpa_candidate(problem) if peers else None
    if sdpa is not None:
        candidates["sdpa-contiguous"] = sdpa
    floor_us = problem.kv_bytes / read_gb_s / 1e3
    results = {name: summary(times) for name, times in timer(candidates, rounds).items()}
    for name, row in results.items():
        row["fraction_of_roof"] = floor_us / row["median_us"]
        if name in errors:
            row["relative_error"] = errors[name]
    return {"name": problem.name, "kv_bytes": problem.kv_bytes, "floor_us": floor_us, "results": results}
