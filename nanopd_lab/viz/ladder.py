"""The ladder of decode kernels against the memory roof: pure functions of a record of `kernels bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nanopd_lab.resources import data_dir
from nanopd_lab.viz.style import FAINT, INK, LabFigure, figure

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


def recorded_ladder() -> dict[str, Any]:
    """The latest record of `kernels bench` that comes with the package."""
    records = [json.loads(path.read_text()) for path in (data_dir() / "recorded").glob("kernels-*.json")]
    latest: dict[str, Any] = max(records, key=lambda record: record["provenance"]["date"])
    return latest


def recorded_nanopd() -> dict[str, Any]:
    """nanoPD's kernel, recorded on its own GPU: only its fraction of that GPU's roof may stand beside others."""
    (path,) = (data_dir() / "recorded").glob("nanopd-attention-*.json")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def shapes_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The twelve shapes and the ragged batch."""
    return [*record["shapes"], record["ragged"]]


def roof_figure(record: Mapping[str, Any], shape: int, source: str = "recorded") -> LabFigure:
    """One shape: how much of the memory roof each rung and peer reaches. `shape` counts as in `shapes_of`."""
    row = shapes_of(record)[shape]
    nanopd = recorded_nanopd()
    bars = [
        (LABELS[name], COLOURS[name], row["results"][name], "") for name in LABELS if name in row["results"]
    ]
    theirs = next((other for other in nanopd["shapes"] if other["name"] == row["name"]), None)
    if theirs:
        bars.insert(0, ("nanoPD", "#FFFFFF", theirs, f"on {_short(nanopd)}, of that GPU's roof"))
    fig = figure(9.6, 1.6 + 0.36 * len(bars))
    axes = fig.subplots()
    for place, (_, colour, result, note) in enumerate(bars):
        percent = 100 * result["fraction_of_roof"]
        axes.barh(
            place, percent, color=colour, edgecolor=INK, linewidth=0.7, height=0.7, hatch="//" if note else ""
        )
        text, inside = f" {percent:.1f} %   {result['median_us']:,.0f} µs   {note} ", percent > 70
        side, ink = ("right", "white") if inside else ("left", INK)
        axes.text(percent, place, text, va="center", ha=side, fontsize=9.5, color=ink)
    axes.axvline(100, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 106)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("of the measured memory bandwidth (%)")
    axes.set_title(
        f"{row['name'].replace(' x ', ' × ')} tokens: {row['kv_bytes'] / 1e6:,.0f} MB of K and V, at best "
        f"{row['floor_us']:,.1f} µs on {_short(record)} ({source}, {record['provenance']['date'][:10]})",
        loc="left", fontsize=10.5, color=INK,
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    return fig


def _short(record: Mapping[str, Any]) -> str:
    words = record["device"]["name"].replace("NVIDIA ", "").split()
    return f"an {words[0]}" if words[0][:1] in "AH" else words[0]


def ladder_figure(record: Mapping[str, Any], source: str = "recorded") -> LabFigure:
    """Effective bandwidth (KV bytes over time) of every rung and peer, by shape, under the measured roof.

    `source` is the label that says where the figures come from: "recorded" or "measured here".
    """
    shapes = shapes_of(record)
    roof = record["ceilings"]["read_gb_s"]
    fig = figure(9.6, 5.2)
    axes = fig.subplots()
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
    return fig
