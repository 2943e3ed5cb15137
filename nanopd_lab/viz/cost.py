"""A cost model beside what was measured: how near it comes, where a simpler one breaks, and what the host adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nanopd_lab.cost.fitting import StepSample, errors
from nanopd_lab.cost.grid import Point
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.nanopd import NanoPDModel
from nanopd_lab.cost.roofline import ChunkShape
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, KV, PREFILL, LabFigure, figure

MIXED = "#CC79A7"
LOOKS = {
    "prefill": (PREFILL, "s", "prefill"),
    "decode": (DECODE, "o", "decode"),
    "mixed": (KV, "^", "mixed"),
    "held out": (MIXED, "D", "mixed, held out"),
}
BAND = 0.1
MOST_ERROR = 0.6  # of the axis of errors; what is beyond is drawn on its edge


def prediction(
    steps: Mapping[str, Sequence[StepSample]], model: IterationModel, source: str, name: str = "the model"
) -> LabFigure:
    """Predicted against measured, and the relative error of each step; the band is ±10 %.

    Args:
        steps: by "prefill", "decode", "mixed" and "held out"
        source: "measured here" or "recorded …"
        name: what the model is called
    """
    fig = figure(9.6, 4.6)
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.15))
    for kind, samples in steps.items():
        colour, marker, label = LOOKS[kind]
        measured = np.array([1e3 * s.seconds for s in samples])
        predicted = np.array([1e3 * model.of_features(s.step) for s in samples])
        error = np.clip(predicted / measured - 1, -MOST_ERROR, MOST_ERROR)
        for ax, values in ((left, predicted), (right, 100 * error)):
            ax.plot(
                measured, values, linestyle="none", marker=marker, markersize=7, color=colour,
                markeredgecolor="white", markeredgewidth=0.7, label=label, zorder=4 if kind == "held out" else 3,
            )  # fmt: skip
    every = [1e3 * s.seconds for samples in steps.values() for s in samples]
    low, high = 0.6 * min(every), 1.6 * max(every)
    line = np.array([low, high])
    left.fill_between(line, (1 - BAND) * line, (1 + BAND) * line, color=FAINT, alpha=0.2, linewidth=0)
    left.plot(line, line, color=INK, linewidth=1)
    right.axhspan(-100 * BAND, 100 * BAND, color=FAINT, alpha=0.2, linewidth=0)
    right.axhline(0, color=INK, linewidth=1)
    for ax in (left, right):
        _logarithmic(ax, "x")
        ax.set_xlim(low, high)
        ax.set_xlabel("measured (ms)")
        _tidy(ax)
    _logarithmic(left, "y")
    left.set_ylim(low, high)
    left.set_ylabel("predicted (ms)")
    right.set_ylim(-105 * MOST_ERROR, 105 * MOST_ERROR)
    right.set_ylabel("predicted is longer (+) or shorter (−), %")
    left.set_title(f"predicted and measured steps,\n{source}", loc="left", fontsize=11, color=INK)
    found = errors(model, steps["held out"])
    right.set_title(
        f"{name}:\nheld-out error {found.mean:.1%} on average, {found.maximum:.0%} at most",
        loc="left", fontsize=11, color=INK,
    )  # fmt: skip
    left.legend(loc="upper left", frameon=False, fontsize=9.5)
    return fig


def formula_breaks(
    timed: Sequence[tuple[Point, float]], model: IterationModel, nanopd: NanoPDModel, source: str
) -> LabFigure:
    """Measured steps, the iteration model and nanoPD's formulas: over prompt length, context and batch.

    Raises:
        ValueError: no whole prompt or no decode step among the steps.
    """
    prompts = [(p.tokens, s) for p, s in timed if p.kind == "prefill" and p.chunks[0].past == 0]
    decodes = [(p.tokens, p.chunks[0].past, s) for p, s in timed if p.kind == "decode"]
    if not prompts or not decodes:
        raise ValueError(f"{len(prompts)} whole prompts and {len(decodes)} decode steps; both are needed")
    fig = figure(9.6, 4.4)
    prompt, context, batch = fig.subplots(1, 3)
    _prompts(prompt, prompts, model, nanopd)
    batches = sorted({b for b, _, _ in decodes})
    contexts = sorted({c for _, c, _ in decodes})
    shown = sorted({batches[0], batches[len(batches) // 2], batches[-1]})
    x = np.geomspace(contexts[0], contexts[-1], 60)
    for each in shown:
        rows = [(c, s) for b, c, s in decodes if b == each]
        own = [model.decode_seconds(each, round(each * value)) for value in x if value <= rows[-1][0]]
        _curves(context, x[: len(own)], own, [nanopd.decode_seconds(each)] * len(own), rows, DECODE)
        context.annotate(
            f"{each}", (rows[-1][0], 1e3 * rows[-1][1]), textcoords="offset points", xytext=(8, -3),
            fontsize=9, color=INK,
        )  # fmt: skip
    context.set_xlim(contexts[0] / 1.4, contexts[-1] * 2.2)
    context.set_title("decode, by context\n(number: sequences)", loc="left", fontsize=10.5, color=INK)
    context.set_xlabel("context of each (tokens)")
    # The longest context that was measured at many batches.
    full = max(contexts, key=lambda c: (len([1 for _, other, _ in decodes if other == c]), c))
    x = np.geomspace(batches[0], batches[-1], 60)
    rows = [(b, s) for b, c, s in decodes if c == full]
    own = [_decode_at(model, value, full) for value in x]
    theirs = [nanopd.beta_s * max(1.0, value / nanopd.threshold) for value in x]
    _curves(batch, x, own, theirs, rows, DECODE)
    batch.set_title(f"decode, by sequences\n(context {full:,})", loc="left", fontsize=10.5, color=INK)
    batch.set_xlabel("sequences")
    for ax in (context, batch):
        ax.set_ylabel("step (ms)")
        _logarithmic(ax, "y")
    for ax in (prompt, context, batch):
        _logarithmic(ax, "x", narrow=True)
        _tidy(ax)
    lines = [
        Line2D([], [], color=INK, linestyle="none", marker="o", label=f"measured ({source})"),
        Line2D([], [], color=INK, linewidth=1.8, label="iteration model"),
        Line2D(
            [], [], color=ALERT, linewidth=1.8, linestyle="--", label="nanoPD's formulas, fitted to the same"
        ),
    ]
    fig.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return fig


def launch_overhead_view(
    graphs: Sequence[StepSample], launched: Sequence[StepSample], host_s: float, source: str
) -> LabFigure:
    """Each step launched operator by operator over the same step as a CUDA graph; the host's time is a floor.

    Args:
        graphs, launched: of the same steps; those that only one of them has are left out
        host_s: the floor that is drawn

    Raises:
        ValueError: no step is in both.
    """
    before = {s.step: 1e3 * s.seconds for s in launched}
    pairs = [(s.step, 1e3 * s.seconds, before[s.step]) for s in graphs if s.step in before]
    if not pairs:
        raise ValueError("no step was timed both with CUDA graphs and without")
    fig = figure(9.6, 4.6)
    ax = fig.add_subplot()
    low, high = 0.7 * min(x for _, x, _ in pairs), 1.4 * max(max(x, y) for _, x, y in pairs)
    x = np.geomspace(low, high, 300)
    ax.plot(x, x, color=FAINT, linewidth=1.5, label="no overhead")
    ax.plot(
        x, np.maximum(x, 1e3 * host_s), color=ALERT, linewidth=1.8, linestyle="--",
        label=f"the longer of the two: the device, or a host of {1e3 * host_s:.1f} ms",
    )  # fmt: skip
    for kind in ("decode", "prefill"):
        rows = [row for row in pairs if (row[0].tokens > row[0].sequences) == (kind == "prefill")]
        colour, marker, label = LOOKS[kind]
        ax.plot(
            [row[1] for row in rows], [row[2] for row in rows], linestyle="none", marker=marker, markersize=8,
            color=colour, markeredgecolor="white", markeredgewidth=0.7, label=f"{label} ({source})", zorder=3,
        )  # fmt: skip
    for axis in ("x", "y"):
        _logarithmic(ax, axis)
    ax.set_xlim(low, high)
    ax.set_ylim(low, high)
    ax.set_xlabel("step as a CUDA graph: the device's time (ms)")
    ax.set_ylabel("the same, each operator launched (ms)")
    ax.legend(loc="lower right", frameon=False, fontsize=9.5)
    _tidy(ax)
    return fig


def _prompts(ax: Axes, rows: Sequence[tuple[int, float]], model: IterationModel, nanopd: NanoPDModel) -> None:
    """Time a token of whole prompts."""
    x = np.unique(np.geomspace(rows[0][0], rows[-1][0], 60).round())
    own = [model.seconds([ChunkShape(int(value))]) / value for value in x]
    _curves(ax, x, own, [nanopd.alpha_s] * len(x), [(n, s / n) for n, s in rows], PREFILL)
    _logarithmic(ax, "y")
    ax.set_title("whole prompts,\ntime a token", loc="left", fontsize=10.5, color=INK)
    ax.set_xlabel("prompt (tokens)")
    ax.set_ylabel("step / tokens (ms)")


def _decode_at(model: IterationModel, batch: float, context: int) -> float:
    """Between two whole batches, on the straight line."""
    low = int(batch)
    first, second = (model.decode_seconds(b, b * context) for b in (low, low + 1))
    return first + (batch - low) * (second - first)


def _curves(
    ax: Axes,
    x: Sequence[float] | np.ndarray,
    own_s: Sequence[float],
    nanopd_s: Sequence[float],
    rows: Sequence[tuple[float, float]],
    colour: str,
) -> None:
    ax.plot(x, 1e3 * np.array(nanopd_s), color=ALERT, linewidth=1.8, linestyle="--")
    ax.plot(x, 1e3 * np.array(own_s), color=INK, linewidth=1.8)
    ax.plot(
        [value for value, _ in rows], [1e3 * s for _, s in rows], linestyle="none", marker="o", markersize=7,
        color=colour, markeredgecolor="white", markeredgewidth=0.7, zorder=3,
    )  # fmt: skip


def _logarithmic(ax: Axes, axis: str, narrow: bool = False) -> None:
    """Logarithmic, with plain numbers (50 and not 5·10¹); fewer of them where many decades share a narrow axis."""
    getattr(ax, f"set_{axis}scale")("log")
    found = getattr(ax, f"{axis}axis")
    low, high = getattr(ax, f"get_{axis}lim")()
    found.set_major_locator(LogLocator(subs=(1,) if narrow and high / low > 90 else (1, 2, 5)))
    found.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    found.set_minor_formatter(NullFormatter())


def _tidy(ax: Axes) -> None:
    ax.grid(True, which="major", alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9.5)
