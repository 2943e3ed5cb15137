"""Each transport against the link under it, measured in the same run and taking turns with it.

    nanopd-lab transfer bench --tokens 256 2048 8192 --processes 1 2

A pull is timed on the host, from `start` to the `poll` that reports it, with scattered blocks, once alone and once with
several under way (as when a prompt's chunks follow each other); its bytes are checked first. The
yardsticks are in `transfer_links`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from nanopd_lab.bench.transfer_links import link_name, links_under, nanopd_way
from nanopd_lab.provenance import provenance
from nanopd_lab.transfer.registry import TRANSPORTS, default_transports
from nanopd_lab.transfer.timed_pair import Pair, connected
from nanopd_lab.transfer.timed_plan import LINK_BYTES, Plan, kv_shape

SCHEMA = "nanopd-lab/transfer/1"
IN_FLIGHT = (1, 4)


def bench(
    transports: Sequence[str] | None = None,
    tokens: Sequence[int] = (256, 2048, 8192),
    shape: str = "qwen3-8b",
    processes: Sequence[int] = (1, 2),
    rounds: int = 9,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The whole record. On GPUs if torch sees any: source and target on two if there are two, else both on one.

    Raises:
        ValueError: unknown shape or transport, or counts below 1.
    """
    if min((*tokens, rounds), default=0) < 1 or not processes or not set(processes) <= {1, 2}:
        raise ValueError(
            f"tokens {tokens} and rounds {rounds} must be at least 1, processes {processes} 1 or 2"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    target = torch.device("cuda", 0) if gpus else torch.device("cpu")
    source = torch.device("cuda", gpus - 1 if gpus <= 2 else 1) if gpus else target
    names = tuple(transports) if transports else default_transports(source, target)
    if wrong := set(names) - set(TRANSPORTS):
        raise ValueError(f"unknown transports {sorted(wrong)}; choose from {', '.join(TRANSPORTS)}")
    plan = Plan(kv_shape(shape), tuple(tokens), source, target, rounds)
    links, rows = {}, []
    for count in processes:
        there = [name for name in names if count == 1 or name != "inproc"]
        if there:
            report(f"{' and '.join(there)}, {count} process{'es' * (count > 1)}")
            with connected(there, plan, count) as pairs:
                links[str(count)], found = measure(plan, pairs, count)
            rows += found
    nanopd = {}
    if gpus:
        report("nanoPD's way: layer-major, one copy a block and layer")
        nanopd = {str(each): _nanopd_row(plan, each) for each in tokens if each <= 2048}
    return {
        "schema": SCHEMA,
        "provenance": provenance(),
        "shape": {"name": shape, **asdict(plan.shape), "dtype": "bfloat16", "block_bytes": plan.shape.block_bytes},
        "devices": {"source": describe(source), "target": describe(target), "shared": source == target},
        "method": {
            "rounds": rounds, "link_bytes": LINK_BYTES,
            "statistic": "median of host times, start to poll, taking turns; scattered blocks",
        },
        "links_gb_s": links,
        "rows": rows,
        "nanopd_layer_major": nanopd,
    }  # fmt: skip


def _nanopd_row(plan: Plan, tokens: int) -> dict[str, float]:
    run = nanopd_way(plan, tokens)
    run()
    seconds = statistics.median(run() for _ in range(3))
    return {"median_ms": 1e3 * seconds, "gb_s": tokens * plan.shape.token_bytes / seconds / 1e9}


def measure(
    plan: Plan, pairs: Sequence[Pair], processes: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """GB/s of each yardstick, and a row for each transport, length and number of pulls under way."""
    candidates: dict[tuple[Any, ...], Callable[[], float]] = {}
    for pair in pairs:
        candidates |= {("link", pair.name, name): run for name, run in links_under(pair).items()}
        for tokens in plan.tokens:
            pair.pull(tokens, 1, check=True)
            for count in IN_FLIGHT:
                candidates["pull", pair.name, tokens, count] = lambda p=pair, t=tokens, c=count: p.pull(t, c)  # type: ignore[misc]
    for run in candidates.values():
        run()
    times: dict[tuple[Any, ...], list[float]] = {key: [] for key in candidates}
    for _ in range(plan.rounds):
        for key, run in candidates.items():
            times[key].append(run())
    medians = {key: statistics.median(each) for key, each in times.items()}
    links = {f"{key[1]}: {key[2]}": LINK_BYTES / medians[key] / 1e9 for key in medians if key[0] == "link"}
    rows = []
    for key, seconds in medians.items():
        if key[0] == "pull":
            _, name, tokens, count = key
            blocks = -(-tokens // plan.shape.block_size)
            speed = blocks * plan.shape.block_bytes / seconds / 1e9
            rows.append({
                "transport": name, "processes": processes, "tokens": tokens, "blocks": blocks, "in_flight": count,
                "median_ms": 1e3 * seconds, "min_ms": 1e3 * min(times[key]), "max_ms": 1e3 * max(times[key]),
                "gb_s": speed, "link": link_name(name, plan.target),
                "fraction_of_link": speed / links[f"{name}: {link_name(name, plan.target)}"],
            })  # fmt: skip
    return links, rows


def describe(device: torch.device) -> str:
    """By name, for the record."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def table(record: Mapping[str, Any]) -> str:
    """The record for people."""
    devices = record["devices"]
    lines = [
        f"{record['shape']['name']}: blocks of {record['shape']['block_bytes'] / 1e6:.2f} MB; "
        + (f"source and target share {devices['source']}" if devices["shared"] else
           f"from {devices['source']} to {devices['target']}")
    ]  # fmt: skip
    for processes, links in record["links_gb_s"].items():
        lines += [
            f"link, {processes} process(es)  {name:<28}{speed:>8.1f} GB/s" for name, speed in links.items()
        ]
    lines.append(
        f"{'transport':<10}{'processes':>10}{'tokens':>8}{'in flight':>10}{'ms a pull':>11}{'GB/s':>8}  of link"
    )
    for row in record["rows"]:
        lines.append(
            f"{row['transport']:<10}{row['processes']:>10}{row['tokens']:>8}{row['in_flight']:>10}"
            f"{row['median_ms']:>11.3f}{row['gb_s']:>8.1f}{row['fraction_of_link']:>9.1%}"
        )
    for tokens, row in record["nanopd_layer_major"].items():
        lines.append(
            f"nanoPD's layout and loop, {tokens} tokens: {row['median_ms']:.1f} ms, {row['gb_s']:.2f} GB/s"
        )
    return "\n".join(lines)
