"""Where a step's time goes on a GPU: by kernel, as the profiler saw it, and summed by what the kernel is for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

# The first words that a kernel's name contains decide; what no row names is "other": norms, rotary embedding,
# activations, sampling, copies.
KINDS = (
    ("attention", ("paged_decode", "paged_prefill", "kv_store", "flash", "fmha", "sdpa", "cudnn")),
    (
        "products",
        (
            "few_rows",
            "some_rows",
            "gemm",
            "gemv",
            "nvjet",
            "cutlass",
            "cublas",
            "splitk",
            "triton_tem",
            "triton_mm",
        ),
    ),
)


@dataclass(frozen=True)
class Breakdown:
    """Microseconds of GPU time per run, by kind and by kernel (the longest first), and of the whole."""

    by_kind: dict[str, float]
    by_kernel: dict[str, float]
    launches: dict[str, float]
    busy_us: float
    span_us: float

    @property
    def idle_us(self) -> float:
        """Time in which no kernel ran: gaps between kernels, and the host being late."""
        return max(0.0, self.span_us - self.busy_us)


def kind_of(kernel: str) -> str:
    """ "attention", "products" or "other"."""
    lowered = kernel.lower()
    return next((kind for kind, words in KINDS if any(word in lowered for word in words)), "other")


def break_down(run: Callable[[], object], repeats: int = 5) -> Breakdown:
    """Profile `run` (after one call for warm-up) on the current GPU.

    `span_us` is the time from the first kernel's begin to the last one's end, divided by `repeats`.
    """
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    kernels: dict[str, float] = defaultdict(float)
    launches: dict[str, float] = defaultdict(float)
    begin, end = float("inf"), 0.0
    for event in profile.events() or ():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        kernels[event.name] += event.time_range.elapsed_us() / repeats
        launches[event.name] += 1 / repeats
        begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
    ordered = dict(sorted(kernels.items(), key=lambda item: -item[1]))
    kinds: dict[str, float] = defaultdict(float)
    for name, time_us in ordered.items():
        kinds[kind_of(name)] += time_us
    busy = sum(ordered.values())
    return Breakdown(dict(kinds), ordered, dict(launches), busy, (end - begin) / repeats)
