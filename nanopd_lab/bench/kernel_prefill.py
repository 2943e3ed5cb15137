"""Paged prefill of a chunk: beside SDPA over contiguous K and V, and beside gathering the pages for SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nanopd_lab.attention.cuda import sdpa_causal
from nanopd_lab.bench.kernel_decode import (
    BLOCK_SIZE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    DecodeProblem,
    decode_problem,
)
from nanopd_lab.bench.kernel_timer import Timer, summary
from nanopd_lab.kernels import ops, reference
from nanopd_lab.kernels.launches import AttentionShape
from nanopd_lab.kernels.reference import TOLERANCES

CHUNKS = ((512, 0), (2048, 0), (8192, 0), (512, 1536), (512, 7680))  # tokens, and tokens before them


def bench_prefill(timer: Timer, rounds: int) -> list[dict[str, Any]]:
    """Paged prefill of one sequence against SDPA over contiguous K and V, and against gathering pages for
    SDPA."""
    rows = []
    scale = HEAD_DIM**-0.5
    shape = AttentionShape(torch.bfloat16, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    workspace = ops.make_workspace(shape, "cuda")
    for length, past in CHUNKS:
        context = length + past
        problem = decode_problem("prefill", [context])
        query = torch.randn(length, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        args = (problem.kv_layer, problem.block_tables, problem.context_lens, starts)
        k, v = (
            x[None].contiguous()
            for x in reference.pages_of(problem.kv_layer, problem.block_tables[0], context)
        )
        folded = query.transpose(0, 1)[None]

        def paged(query: torch.Tensor = query, args: Any = args) -> torch.Tensor:
            return torch.ops.nanopd.paged_prefill(query, *args, workspace, scale)

        def sdpa(folded: torch.Tensor = folded, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
            return sdpa_causal(folded, k, v, scale)

        def gathered(
            problem: DecodeProblem = problem, context: int = context, sdpa: Any = sdpa
        ) -> torch.Tensor:
            k, v = reference.pages_of(problem.kv_layer, problem.block_tables[0], context)
            return sdpa(k=k[None], v=v[None])

        if context <= 2048:
            wanted = reference.attend(query, *args, scale)
            error = reference.relative_error(paged(), wanted)
            if not error <= TOLERANCES[torch.bfloat16]:
                raise AssertionError(f"paged prefill is wrong at {length} tokens after {past}: {error:.2e}")
        pairs = length * (length + 1) / 2 + length * past
        flops = 4 * pairs * HEADS * HEAD_DIM
        candidates: dict[str, Callable[[], Any]] = {
            "paged": paged,
            "sdpa-contiguous": sdpa,
            "gather+sdpa": gathered,
        }
        for name, each in timer(candidates, rounds).items():
            row: dict[str, Any] = {"implementation": name, "tokens": length, "past": past, **summary(each)}
            row["tflop_s"] = flops / row["median_us"] / 1e6
            rows.append(row)
    return rows
