"""What cuDNN's plan for a prompt length costs on the host, and what each call then gains on FlashAttention.

`attention.cuda.PLAN_PAIRS` is from here: the pairs of a query and a key over which the gain pays for the plan.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nanopd_lab.attention.cuda import flash_causal, sdpa_causal
from nanopd_lab.bench.kernel_decode import HEAD_DIM, HEADS, KV_HEADS
from nanopd_lab.bench.kernel_timer import Timer, summary
from nanopd_lab.provenance import provenance

SCHEMA = "nanopd-lab/attention-plans/1"
LENGTHS = (512, 768, 1024, 1536, 2048, 3072, 4096, 8192)
NEW_LENGTHS = 40  # each planned once
SCALE = HEAD_DIM**-0.5


def _prompt(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value = (
        torch.randn(tokens, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    return query, key, value


def _cudnn(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return sdpa_causal(q, k, v, SCALE)


def _host_seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def bench_plans(timer: Timer, rounds: int = 15) -> dict[str, Any]:
    """The record: the price of a plan, what a call takes by either kernel, and the pairs that pay for the plan.

    Needs a Hopper GPU or newer: on others SDPA takes FlashAttention as well, and nothing is gained.
    """
    plans = []
    for tokens in random.Random(0).sample(range(min(LENGTHS), max(LENGTHS)), NEW_LENGTHS):
        prompt = _prompt(tokens)
        run = partial(_cudnn, *prompt)
        first = _host_seconds(run)
        again = statistics.median(_host_seconds(run) for _ in range(5))
        plans.append({"tokens": tokens, "plan_s": first - again})
    plan_s = statistics.median(float(row["plan_s"]) for row in plans)
    calls = []
    for tokens in LENGTHS:
        prompt = _prompt(tokens)
        starts = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
        candidates: dict[str, Callable[[], Any]] = {
            "cudnn": partial(_cudnn, *prompt),
            "flash": partial(flash_causal, *prompt, starts, tokens, SCALE),
        }
        row: dict[str, Any] = {"tokens": tokens}
        row |= {name: summary(times) for name, times in timer(candidates, rounds).items()}
        gained_s = (row["flash"]["median_us"] - row["cudnn"]["median_us"]) / 1e6
        calls.append({**row, "gain_per_pair_s": gained_s / (tokens * tokens / 2)})
    gain_s = statistics.median(float(row["gain_per_pair_s"]) for row in calls)
    return {
        "schema": SCHEMA,
        "provenance": provenance(),
        "attention": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "method": {"rounds": rounds, "statistic": "medians; calls interleaved, plans on the host's clock"},
        "plans": plans,
        "calls": calls,
        "plan_s": plan_s,
        "gain_per_pair_s": gain_s,
        "pairs_that_pay": plan_s / gain_s if gain_s > 0 else None,
    }
