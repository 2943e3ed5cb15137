"""Gaps between tokens, as those feel them who are reading; and what shorter gaps cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nanopd_lab.engine.trace import Trace
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, PREFILL, LabFigure, figure


def itl_spikes(runs: Mapping[str, Trace], readers: Sequence[int], newcomer: int) -> LabFigure:
    """One panel a run: each token of the readers at the time it came, as high as they had waited for it.

    Args:
        readers: requests whose gaps are drawn
        newcomer: the request whose prefill is drawn as a shaded band
    """
    fig = figure(9.6, 1.1 + 2.1 * len(runs))
    panels = fig.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for ax, (name, trace) in zip(panels, runs.items(), strict=True):
        _panel(ax, trace, readers, newcomer)
        worst = max(max(trace.itl_s(reader), default=0.0) for reader in readers)
        ttft = trace.outputs[newcomer].metrics.ttft or 0.0
        ax.set_title(
            f"{name}: longest gap {1e3 * worst:.0f} ms, newcomer's first token after {1e3 * ttft:.0f} ms",
            loc="left",
            fontsize=11,
            color=INK,
        )
    panels[-1].set_xlabel("time (s)")
    panels[0].set_ylim(bottom=0)
    panels[0].set_xlim(left=0)
    legend = [
        Line2D([], [], color=DECODE, marker="o", markersize=5, label="a running request's token"),
        Patch(facecolor=PREFILL, alpha=0.35, label="newcomer: from arrival to first token"),
    ]
    fig.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    return fig


def _panel(ax: Axes, trace: Trace, readers: Sequence[int], newcomer: int) -> None:
    begin = trace.arrivals_s[newcomer]
    ax.axvspan(begin, trace.token_times_s(newcomer)[0], color=PREFILL, alpha=0.35, linewidth=0)
    for reader in readers:
        times = trace.token_times_s(reader)[1:]
        gaps = [1e3 * gap for gap in trace.itl_s(reader)]
        ax.vlines(times, 0, gaps, color=DECODE, linewidth=1, alpha=0.35)
        ax.plot(times, gaps, color=DECODE, linestyle="none", marker="o", markersize=4)
    ax.set_ylabel("gap (ms)")
    ax.grid(True, axis="y", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class Tradeoff:
    """One run: its token budget, the newcomer's TTFT and the gap of those already running meanwhile, in ms."""

    budget: int
    ttft_ms: float
    gap_ms: float


def budget_tradeoff(rows: Sequence[Tradeoff], chosen: int | None = None) -> LabFigure:
    """TTFT of the newcomer against the others' gap between tokens, one point a budget.

    Args:
        chosen: the budget to point out
    """
    fig = figure(9.6, 4.2)
    ax = fig.add_subplot()
    ordered = sorted(rows, key=lambda row: row.budget)
    ax.plot(
        [row.gap_ms for row in ordered],
        [row.ttft_ms for row in ordered],
        color=FAINT,
        linewidth=1,
        marker="o",
        markersize=9,
        markerfacecolor=DECODE,
        markeredgecolor="white",
    )
    for number, row in enumerate(ordered):
        picked = row.budget == chosen
        if picked:
            ax.plot(row.gap_ms, row.ttft_ms, "o", markersize=15, color=ALERT, zorder=3)
        ax.annotate(
            f"{row.budget:,} tokens",
            (row.gap_ms, row.ttft_ms),
            textcoords="offset points",
            xytext=(-9, -17) if number % 2 else (10, 8),  # neighbours' labels must not meet
            ha="right" if number % 2 else "left",
            fontsize=10,
            color=INK,
            weight="bold" if picked else "normal",
        )
    ax.set_xlim(0, 1.2 * max(row.gap_ms for row in rows))
    ax.set_ylim(0, 1.2 * max(row.ttft_ms for row in rows))
    ax.set_xlabel(
        "gap between tokens of the others while the newcomer's prompt is read (ms): better to the left"
    )
    ax.set_ylabel("newcomer's TTFT (ms): better below")
    ax.grid(True, alpha=0.25, which="both")
    ax.spines[["top", "right"]].set_visible(False)
    return fig
