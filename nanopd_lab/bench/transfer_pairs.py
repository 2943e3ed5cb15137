"""Every pair of workers' devices, in both directions: each transport beside the link between the same two.

    nanopd-lab transfer pairs --result-filename pairs.json

One pair after the other, so that nothing else is on the links; source and reader in one process. On a host whose
GPUs are not all connected alike, this shows which should hand over to which.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nanopd_lab.bench.transfer import describe, measure
from nanopd_lab.provenance import provenance
from nanopd_lab.transfer.registry import default_transports
from nanopd_lab.transfer.timed_pair import connected
from nanopd_lab.transfer.timed_plan import Plan, kv_shape

SCHEMA = "nanopd-lab/transfer-pairs/1"


def bench_pairs(
    devices: Sequence[str] | None = None,
    transports: Sequence[str] | None = None,
    tokens: int = 2048,
    shape: str = "qwen3-8b",
    rounds: int = 9,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """GB/s of a pull of so many tokens, and of the link, for every ordered pair.

    Args:
        devices: one a worker; default: every GPU
        transports: default: those that work between the two

    Raises:
        ValueError: fewer than two devices, an unknown shape, or counts below 1.
    """
    if devices is None:
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if len(devices) < 2:
        raise ValueError(
            f"pairs take two devices at least, and there are {len(devices)}; name them: --devices cpu cpu"
        )
    if min(tokens, rounds) < 1:
        raise ValueError(f"tokens {tokens} and rounds {rounds} must be at least 1")
    pairs = []
    for (i, source), (j, target) in itertools.permutations(enumerate(devices), 2):
        plan = Plan(kv_shape(shape), (tokens,), torch.device(source), torch.device(target), rounds)
        names = transports or default_transports(plan.source, plan.target)
        with connected(names, plan, 1) as found:
            links, rows = measure(plan, found, 1)
        report(f"{i} to {j}: " + ", ".join(f"{name} {speed:.0f} GB/s" for name, speed in links.items()))
        pairs.append({"source": i, "target": j, "links_gb_s": links, "rows": rows})
    return {
        "schema": SCHEMA,
        "provenance": provenance(),
        "shape": shape,
        "tokens": tokens,
        "rounds": rounds,
        "devices": [describe(torch.device(device)) for device in devices],
        "pairs": pairs,
    }


def table(record: Mapping[str, Any]) -> str:
    """A matrix for each transport, from the row's device to the column's: GB/s with the most pulls under way, and how
    much of the link that is."""
    best: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    for pair in record["pairs"]:
        for row in sorted(pair["rows"], key=lambda row: row["in_flight"]):
            best.setdefault(row["transport"], {})[pair["source"], pair["target"]] = row
    lines = [f"{record['shape']}, pulls of {record['tokens']} tokens, from row to column"]
    count = len(record["devices"])
    for name, cells in best.items():
        lines.append(f"{name:<8}" + "".join(f"{j:>14}" for j in range(count)))
        for i in range(count):
            row = (cells.get((i, j)) for j in range(count))
            shown = (f"{c['gb_s']:.1f} ({c['fraction_of_link']:.0%})" if c else "–" for c in row)
            lines.append(f"{i:<8}" + "".join(f"{each:>14}" for each in shown))
    return "\n".join(lines)
