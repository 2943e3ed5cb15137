"""The roofline: what a machine allows, and where measured steps lie under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from nanopd_lab.cost.roofline import ChunkShape, ModelDims, Roof, step_cost
from nanopd_lab.viz.style import DECODE, FAINT, INK, KV, PREFILL, LabFigure, figure

COLOURS = {"prefill": PREFILL, "decode": DECODE}
MARKERS = {"prefill": "s", "decode": "o"}
PHASE_NAMES = {"prefill": "prefill, by prompt length", "decode": "decode, by number of sequences"}


@dataclass(frozen=True)
class Point:
    """A step: its phase, what to call it, FLOPs per byte as counted, FLOPs per second as measured."""

    phase: str
    label: str
    intensity: float
    flops_per_s: float


def roofline(roof: Roof, points: Sequence[Point] = (), source: str = "measured here") -> LabFigure:
    """Both ceilings on logarithmic axes, and points under them.

    Args:
        source: where the points come from: "measured here", "recorded" or "modelled"
    """
    fig = figure(9.6, 4.8)
    ax = fig.add_subplot()
    _roof(ax, roof, points)
    for phase, colour in COLOURS.items():
        mine = [point for point in points if point.phase == phase]
        if not mine:
            continue
        ax.plot(
            [point.intensity for point in mine],
            [point.flops_per_s for point in mine],
            linestyle="none",
            marker=MARKERS[phase],
            markersize=8,
            color=colour,
            markeredgecolor="white",
            label=f"{PHASE_NAMES[phase]} ({source})",
        )
        for point in mine:
            ax.annotate(
                point.label,
                (point.intensity, point.flops_per_s),
                textcoords="offset points",
                xytext=(8, -4) if phase == "decode" else (0, -16),
                ha="left" if phase == "decode" else "center",
                fontsize=9,
                color=INK,
            )
    if points:
        ax.legend(loc="upper left", frameon=False, fontsize=10)
    return fig


def _roof(ax: Axes, roof: Roof, points: Sequence[Point], narrow: bool = False) -> None:
    """Axes, both ceilings and the ridge."""
    reach = [roof.ridge / 30, roof.ridge * 30, *(point.intensity for point in points)]
    left, right = min(reach) / 1.5, max(reach) * 1.5
    x = np.geomspace(left, right, 200)
    y = np.array([roof.flops_per_s(value) for value in x])
    ax.plot(x, y, color=INK, linewidth=2)
    ax.set_xscale("log")
    ax.set_yscale("log")
    low = min([y[0], *(point.flops_per_s for point in points)]) / 2.5
    ax.set_xlim(left, right)
    ax.set_ylim(low, roof.peak_flops_per_s * 2.5)
    ax.fill_between(x, low, y, where=list(x <= roof.ridge), color=DECODE, alpha=0.07, linewidth=0)
    ax.fill_between(x, low, y, where=list(x >= roof.ridge), color=PREFILL, alpha=0.09, linewidth=0)
    ax.axvline(roof.ridge, color=FAINT, linewidth=1, linestyle=":")
    top, font = roof.peak_flops_per_s * 1.25, 9 if narrow else 10
    split = "\n" if narrow else " "
    ax.text(
        roof.ridge / 1.07,
        top if narrow else low * 1.15,
        f"memory is the limit:{split}{roof.bandwidth_bytes_per_s / 1e9:,.0f} GB/s",
        ha="right",
        fontsize=font,
        color=INK,
    )
    ax.text(
        roof.ridge * 1.07,
        top if narrow else low * 1.15,
        f"computing is the limit:{split}{_rate(roof.peak_flops_per_s)}",
        ha="left",
        fontsize=font,
        color=INK,
    )
    label = f"ridge: {roof.ridge:.1f} FLOP/byte"
    ax.text(roof.ridge * 1.07, low * 1.15 if narrow else top, label, ha="left", fontsize=9, color=FAINT)
    ax.set_xlabel("arithmetic intensity (FLOPs per byte moved)")
    ax.set_ylabel("FLOPs per second")
    if roof.name:
        ax.set_title(f"Roofline of {roof.name}", loc="left", fontsize=11, color=INK)
    ax.grid(True, which="major", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def _rate(flops_per_s: float) -> str:
    if flops_per_s >= 1e12:
        return f"{flops_per_s / 1e12:,.0f} TFLOP/s"
    return f"{flops_per_s / 1e9:,.0f} GFLOP/s"


BYTE_KINDS = (
    ("weights", "weight_bytes", DECODE),
    ("KV read and written", "", KV),
    ("activations", "activation_bytes", "#8EC7E8"),
)


def decode_budget(
    model: ModelDims, roof: Roof, batch: int, context: int, most: tuple[int, int] = (64, 2048)
) -> LabFigure:
    """Where the time of one decode step goes, at best, and where the step lies under the roof. *Modelled*.

    Args:
        batch: sequences that share the step
        context: tokens of each that are in the KV cache
        most: the largest batch and context that will be asked for; it fixes the axes
    """
    fig = figure(9.6, 4.2)
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.25))
    cost = step_cost(model, [ChunkShape(1, context)] * batch)
    seconds = roof.seconds(cost)
    _roof(left, roof, [], narrow=True)
    left.set_ylim(top=roof.peak_flops_per_s * 6)
    left.set_title(f"{model.name} on {roof.name}", loc="left", fontsize=11)
    left.plot(
        cost.intensity,
        roof.flops_per_s(cost.intensity),
        marker="o",
        markersize=12,
        color=DECODE,
        markeredgecolor="white",
    )
    moved = 0.0
    for label, field, colour in BYTE_KINDS:
        nbytes = getattr(cost, field) if field else cost.kv_read_bytes + cost.kv_write_bytes
        took = 1e3 * nbytes / roof.bandwidth_bytes_per_s
        right.barh(1, took, left=moved, height=0.5, color=colour, edgecolor="white", label=f"move: {label}")
        moved += took
    computed = 1e3 * cost.flops / roof.peak_flops_per_s
    right.barh(0, computed, height=0.5, color=PREFILL, label="compute")
    right.axvline(1e3 * seconds, ymax=0.72, color=INK, linewidth=1.5, linestyle="--")
    right.set_yticks([0, 1], ["compute", "move"])
    right.set_ylim(-0.5, 2.2)
    widest = roof.seconds(step_cost(model, [ChunkShape(1, most[1])] * most[0]))
    right.set_xlim(0, 1.05e3 * widest)
    right.set_xlabel("time of one decode step, at best (ms)")
    right.set_title(
        f"batch {batch}, context {context:,}: {1e3 * seconds:.3g} ms, {batch / seconds:,.0f} tokens/s",
        loc="left",
        fontsize=11,
    )
    right.legend(loc="upper right", ncols=2, frameon=False, fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    return fig
