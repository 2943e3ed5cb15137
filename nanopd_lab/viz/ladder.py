"""The ladder of decode kernels against the memory roof: a pure function of a record of `kernels bench`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe palette; the rungs darken as they climb, peers are drawn hollow.
COLOURS = {
    "naive": "#999999", "online": "#E69F00", "gqa": "#F0E442", "split": "#56B4E9", "mma": "#0072B2",
    "sdpa-contiguous": "#009E73", "flashinfer": "#CC79A7", "flashinfer-tc": "#D55E00",
}  # fmt: skip
LABELS = {
    "naive": "(a) naive",
    "online": "(b) one pass",
    "gqa": "(c) once per group",
    "split": "(d) split-KV, staged",
    "mma": "(e) tensor cores",
    "sdpa-contiguous": "SDPA, contiguous",
    "flashinfer": "FlashInfer",
    "flashinfer-tc": "FlashInfer, tensor cores",
}
PEERS = ("sdpa-contiguous", "flashinfer", "flashinfer-tc")


def ladder_figure(record: Mapping[str, Any], source: str = "recorded") -> Figure:
    """Effective bandwidth (KV bytes over time) of every rung and peer, by shape, under the measured roof.

    `source` is the label that says where the figures come from: "recorded" or "measured here".
    """
    shapes = [*record["shapes"], record["ragged"]]
    roof = record["ceilings"]["read_gb_s"]
    figure = Figure(figsize=(10, 5.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.axhline(roof, color="black", linewidth=1.2)
    axes.annotate(
        f"memory roof, {roof:,.0f} GB/s read",
        (0, roof),
        textcoords="offset points",
        xytext=(2, 4),
        fontsize=9,
    )
    for name, label in LABELS.items():
        points = [
            (x, shape["kv_bytes"] / shape["results"][name]["median_us"] / 1e3)
            for x, shape in enumerate(shapes)
            if name in shape["results"]
        ]
        if not points:
            continue
        peer = name in PEERS
        axes.plot(
            *zip(*points, strict=True),
            marker="s" if peer else "o",
            markersize=5,
            color=COLOURS[name],
            label=label,
            linestyle=":" if peer else "-",
            linewidth=1.1 if peer else 1.8,
            markerfacecolor="white" if peer else COLOURS[name],
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), [shape["name"] for shape in shapes], rotation=35, ha="right")
    axes.set_xlabel("sequences × context tokens")
    axes.set_ylabel("K and V read, GB/s (log scale)")
    axes.set_title(
        f"Paged decode attention, {record['device']['name']}, {record['attention']['dtype']} "
        f"({source}, {record['provenance']['date'][:10]})"
    )
    axes.grid(True, which="major", axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=2, loc="lower right")
    return figure
