"""When each request waited, was read and was answered."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from nanopd_lab.engine.trace import Trace
from nanopd_lab.viz.style import DECODE, INK, PREFILL, WAITING, LabFigure, figure

PHASES = (
    ("waiting", WAITING, "///"),
    ("prefill: reading the prompt", PREFILL, ""),
    ("decode: writing the answer", DECODE, ""),
)


def request_timeline(runs: Mapping[str, Trace]) -> LabFigure:
    """One panel a run on a shared time axis; one bar a request, from its arrival to its last token."""
    heights = [len(trace.outputs) for trace in runs.values()]
    fig = figure(9.6, 1.3 + 0.24 * sum(heights) + 0.5 * len(runs))
    panels = fig.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, trace) in zip(panels, runs.items(), strict=True):
        _panel(ax, trace)
        ax.set_title(
            f"{name}: {trace.output_tokens} tokens in {trace.seconds:.1f} s, {trace.tokens_per_s:.0f} tokens/s",
            loc="left",
            fontsize=11,
            color=INK,
        )
    panels[-1].set_xlabel("time since all questions arrived (s)")
    legend = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=name) for name, colour, hatch in PHASES
    ]
    fig.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    return fig


def _panel(ax: Axes, trace: Trace) -> None:
    for row, output in enumerate(trace.outputs):
        times = output.metrics
        moments = (
            times.arrival_time,
            times.first_scheduled_time,
            times.first_token_time,
            times.finished_time,
        )
        for (_, colour, hatch), begin, end in zip(PHASES, moments, moments[1:], strict=False):
            assert begin is not None
            assert end is not None, f"request {output.request_id} has not ended"
            left = begin - times.arrival_time
            ax.barh(
                row,
                end - begin,
                left=left,
                height=0.72,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
            )
    ax.set_yticks(range(len(trace.outputs)), [str(number + 1) for number in range(len(trace.outputs))])
    ax.set_ylabel("question")
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
