"""What every step did, on a time axis: a Gantt chart of a recorded run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from nanopd_lab.engine.trace import StepRecord, Trace
from nanopd_lab.viz.style import ALERT, DECODE, INK, PREFILL, WAITING, LabFigure, figure

COLOURS = {"prefill": PREFILL, "decode": DECODE}


def step_gantt(
    runs: Mapping[str, Trace], names: Sequence[str] | None = None, until_s: float | None = None
) -> LabFigure:
    """One panel a run, one row a request, one column a step; as wide as the step took.

    Args:
        names: what the requests are called; their numbers from 1 if None
        until_s: draw only so much of the time axis; all of it if None
    """
    heights = [len(trace.outputs) for trace in runs.values()]
    fig = figure(9.6, 1.2 + sum(0.28 * height + 0.55 for height in heights))
    panels = fig.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    longest = max(trace.steps[-1].end_s for trace in runs.values())
    for ax, (name, trace) in zip(panels, runs.items(), strict=True):
        ax.set_xlim(0, until_s or 1.01 * longest)
        _panel(ax, trace, names or [str(number + 1) for number in range(len(trace.outputs))])
        ax.set_title(name, loc="left", fontsize=11, color=INK)
    panels[-1].set_xlabel("time (s)")
    legend: list[Patch | Line2D] = [
        Patch(facecolor=WAITING, label="has arrived, gets nothing"),
        Patch(facecolor=PREFILL, label="prefill (number: tokens)"),
        Patch(facecolor=DECODE, label="decode: one token"),
    ]
    if any(step.preempted for trace in runs.values() for step in trace.steps):
        legend.append(
            Line2D(
                [],
                [],
                color=ALERT,
                marker="X",
                linestyle="none",
                markersize=9,
                label="preempted: blocks lost",
            )
        )
    fig.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=10)
    return fig


def _panel(ax: Axes, trace: Trace, names: Sequence[str]) -> None:
    for row in range(len(trace.outputs)):
        begin = trace.arrivals_s[row] if trace.arrivals_s else 0.0
        end = max(step.end_s for step in trace.steps for work in step.work if work.request == row)
        ax.add_patch(Rectangle((begin, row - 0.3), end - begin, 0.6, facecolor=WAITING, linewidth=0))
    for step in trace.steps:
        for work in step.work:
            _cell(ax, step, work.request, work.phase, work.tokens)
        for row in step.preempted:
            ax.plot(
                step.start_s, row, marker="X", color=ALERT, markersize=9, markeredgecolor="white", zorder=4
            )
    ax.set_ylim(len(trace.outputs) - 0.5, -0.5)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylabel("request")
    ax.tick_params(labelsize=9)
    ax.spines[["top", "right"]].set_visible(False)


def _cell(ax: Axes, step: StepRecord, row: int, phase: str, tokens: int) -> None:
    ax.add_patch(
        Rectangle(
            (step.start_s, row - 0.36),
            step.seconds,
            0.72,
            facecolor=COLOURS[phase],
            edgecolor="white",
            linewidth=0.6,
            zorder=2,
        )
    )
    wide = ax.get_xlim()[1] / 960 * 9.5 * len(str(tokens))  # what the number needs
    if phase == "prefill" and step.seconds > wide:
        middle = step.start_s + step.seconds / 2
        ax.text(
            middle, row, str(tokens), ha="center", va="center", fontsize=9, color=INK, zorder=3, clip_on=True
        )
