"""Time the kernels against the memory roof, PyTorch's SDPA and, where it is installed, FlashInfer.

The method is `kernel_timer`'s; the roof is the read bandwidth measured in the same run. Shapes: `TWELVE` (Qwen3-8B
attention: 32 query heads, 8 KV heads, head_dim 128, block size 16, bf16) and 128 ragged sequences.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from nanopd_lab.bench.kernel_decode import (
    BLOCK_SIZE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    bench_decode,
    decode_problem,
    ragged_contexts,
)
from nanopd_lab.bench.kernel_moves import bench_moves
from nanopd_lab.bench.kernel_prefill import bench_prefill
from nanopd_lab.bench.kernel_timer import FLUSH_BYTES, Timer, measure_ceilings
from nanopd_lab.kernels import gpu
from nanopd_lab.kernels.decode_launches import RUNGS
from nanopd_lab.provenance import provenance

TWELVE = (
    (1, 512),
    (1, 2048),
    (1, 8192),
    (1, 32768),
    (8, 512),
    (8, 2048),
    (8, 8192),
    (32, 512),
    (32, 2048),
    (32, 8192),
    (128, 512),
    (128, 2048),
)
SCHEMA = 1


def bench(rungs: Sequence[str] = RUNGS, rounds: int = 31, peers: bool = True) -> dict[str, Any]:
    """The whole record: ceilings, the twelve shapes, the ragged batch, moves, prefill. Needs a GPU
    (ValueError)."""
    if not torch.cuda.is_available():
        raise ValueError(
            "it measures a GPU, and torch sees none here; recorded runs are in data/recorded/, and "
            "`nanopd-lab kernels check` runs every kernel in the emulator"
        )
    timer = Timer()
    ceilings = measure_ceilings(timer)
    shapes = []
    for batch, context in TWELVE:
        problem = decode_problem(f"{batch} x {context}", [context] * batch)
        row = bench_decode(timer, problem, ceilings["read_gb_s"], rungs, rounds, peers)
        shapes.append({**row, "batch": batch, "context": context})
        del problem
    contexts = ragged_contexts()
    ragged = bench_decode(
        timer, decode_problem("128 ragged", contexts), ceilings["read_gb_s"], rungs, rounds, peers
    )
    return {
        "kind": "kernels",
        "schema": SCHEMA,
        "provenance": provenance(),
        "device": {
            "name": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": _driver_version(),
            **asdict(gpu.limits_of(torch.cuda.current_device())),
        },
        "peers": _peer_versions() if peers else {},
        "method": {
            "rounds": rounds,
            "flush_bytes": FLUSH_BYTES,
            "statistic": "median, interleaved, L2 flushed by reading",
        },
        "attention": {
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "block_size": BLOCK_SIZE,
            "dtype": "bfloat16",
        },
        "ceilings": ceilings,
        "shapes": shapes,
        "ragged": {**ragged, "contexts": list(contexts)},
        "moves": bench_moves(timer, ceilings["copy_gb_s"], rounds),
        "prefill": bench_prefill(timer, rounds),
    }


def _driver_version() -> str:
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _peer_versions() -> dict[str, str]:
    from importlib import metadata

    versions = {"torch": str(torch.__version__)}
    try:
        versions["flashinfer"] = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        versions["flashinfer"] = "not installed"
    return versions


def geometric_mean(record: Mapping[str, Any], name: str) -> float | None:
    """Geometric mean of the medians over the twelve shapes, µs; None where a shape lacks `name`."""
    rows = [shape["results"].get(name) for shape in record["shapes"]]
    if any(row is None for row in rows):
        return None
    return math.exp(sum(math.log(row["median_us"]) for row in rows) / len(rows))


def table(record: Mapping[str, Any]) -> str:
    """The record as text: one row a shape, one column an implementation, in µs, and the best rung's fraction
    of the roof."""
    columns = list(dict.fromkeys(name for shape in record["shapes"] for name in shape["results"]))
    lines = [
        f"{'shape':<12}{'roof':>8}" + "".join(f"{name[:14]:>15}" for name in columns) + f"{'of roof':>9}"
    ]
    for shape in [*record["shapes"], record["ragged"]]:
        cells = "".join(
            f"{shape['results'][name]['median_us']:>15.1f}" if name in shape["results"] else f"{'–':>15}"
            for name in columns
        )
        ours = max(shape["results"][r]["fraction_of_roof"] for r in RUNGS if r in shape["results"])
        lines.append(f"{shape['name']:<12}{shape['floor_us']:>8.1f}{cells}{ours:>9.1%}")
    means = ((name, geometric_mean(record, name)) for name in columns)
    lines.append("geometric means: " + ", ".join(f"{name} {mean:.1f} µs" for name, mean in means if mean))
    for row in record["moves"]:
        lines.append(
            f"{row['operation']:<24}{row['tokens']:>6} tokens {row['median_us']:>9.1f} µs "
            f"{row['gb_s']:>7.0f} GB/s {row['fraction_of_copy']:>6.1%} of copy"
        )
    for row in record["prefill"]:
        lines.append(
            f"prefill {row['implementation']:<17}{row['tokens']:>6} after {row['past']:<6} "
            f"{row['median_us']:>9.1f} µs {row['tflop_s']:>6.0f} TFLOP/s"
        )
    return "\n".join(lines)
