"""Who computes and what is on its way: a hand-over between two workers, as it was and as it could be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.transfer.pipeline import chunk_arrivals
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, KV, PAPER, PREFILL, WAITING, LabFigure, figure

SOURCE, LINK, TARGET = 0, 1, 2  # lanes, from the top
NARROWEST = 0.004  # of the axis: what is shorter is drawn so wide, to be seen


def handover_timeline(
    steps: Mapping[str, Sequence[StepRecord]], outputs: Sequence[ClusterOutput]
) -> LabFigure:
    """Steps of both workers and the pulls between them: the whole of it above, its last moments below.

    Time counts from the arrival of the last of `outputs`, whose chunks and pulls are numbered.

    Args:
        steps: of every worker, by name, as `Cluster.steps` returns them
        outputs: of all requests that ran

    Raises:
        ValueError: the last request was not handed over.
    """
    newcomer = outputs[-1]
    last = newcomer.paths[0].last
    if last is None or last.decode is None or last.decode.adopted is None or last.prefill is None:
        raise ValueError(
            f"request {newcomer.request_id} was served by one worker; there is no hand-over to draw"
        )
    zero, sampled, adopted = newcomer.paths[0].arrival, last.prefill.sampled, last.decode.adopted
    assert sampled is not None
    key = f"{newcomer.request_id}/"
    source, target = steps[last.route.prefill], steps[last.route.decode]
    chunks = [s for s in source if any(name.startswith(key) for name, _, _ in s.chunks)]
    first_own = next(
        (s.end for s in target if s.begin >= adopted and any(n.startswith(key) for n, _, _ in s.chunks)),
        adopted,
    )
    fig = figure(9.6, 5.4)
    whole, end = fig.subplots(2, 1)
    span, rest = first_own - zero, max(adopted - sampled, 1e-3)
    whole.set_xlim(-0.06 * span, 1.04 * span)
    end.set_xlim(1e3 * (sampled - zero - 0.5 * rest), 1e3 * (max(first_own, adopted) - zero + 0.1 * rest))
    for ax, unit in ((whole, 1.0), (end, 1e3)):
        for step in source:
            number, colour = (chunks.index(step) + 1, PREFILL) if step in chunks else ("", WAITING)
            _bar(ax, SOURCE, unit * (step.begin - zero), unit * (step.end - zero), colour, number)
        for step in target:
            begin, finish, sequences = step.begin - zero, step.end - zero, len(step.chunks)
            _bar(ax, TARGET, unit * begin, unit * finish, DECODE, sequences)
        done = 0
        for begin, finish in sorted(last.decode.pulls):
            published = sum(chunk.end <= begin for chunk in chunks)
            _bar(
                ax, LINK, unit * (begin - zero), unit * (finish - zero), KV, _range(done + 1, published), True
            )
            done = published
        _lanes(ax, [f"{last.route.prefill} computes", "pulls", f"{last.route.decode} computes"])
    _moments(end, 1e3 * (sampled - zero), 1e3 * (adopted - zero))
    whole.set_xlabel("time since the long prompt arrived (s)")
    end.set_xlabel("the same, its end (ms)")
    legend: list[Patch | Line2D] = [
        Patch(facecolor=PREFILL, label="chunk of the prompt"),
        Patch(facecolor=KV, label="pull of its blocks"),
        Patch(facecolor=DECODE, label="decode step (number: sequences)"),
        Line2D([], [], color=ALERT, linewidth=2, label="visible time"),
    ]
    if any(step not in chunks and step.end - zero > whole.get_xlim()[0] for step in source):
        legend.append(Patch(facecolor=WAITING, label="other prompts"))
    fig.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, fontsize=9.5)
    return fig


def pipeline_view(
    compute_s: Sequence[float],
    copy_s: Sequence[float],
    arrivals: Callable[[Sequence[float], Sequence[float], bool], list[float]] = chunk_arrivals,
) -> LabFigure:
    """Modelled: chunks computed and copied, one panel with overlap and one without, on the same time axis.

    Args:
        compute_s, copy_s: of each chunk
        arrivals: says when each chunk has arrived
    """
    fig = figure(9.6, 4.2)
    panels = fig.subplots(2, 1, sharex=True)
    total = sum(compute_s) + sum(copy_s)
    for ax, overlap in zip(panels, (True, False), strict=True):
        ax.set_xlim(0, 1.02 * total)
        now = 0.0
        for number, seconds in enumerate(compute_s, 1):
            _bar(ax, SOURCE, now, now + seconds, PREFILL, number)
            now += seconds
        ends = arrivals(compute_s, copy_s, overlap)
        for number, (end, seconds) in enumerate(zip(ends, copy_s, strict=True), 1):
            _bar(ax, LINK, end - seconds, end, KV, number)
        _lanes(ax, ["compute", "copy"])
        name = (
            "a chunk is copied while the next is computed"
            if overlap
            else "all is computed, then all is copied"
        )
        visible = ends[-1] - now
        ax.set_title(
            f"modelled, {name}: the last block arrives after {ends[-1]:.2f} s, {visible:.2f} s of it visible",
            loc="left", fontsize=11, color=INK,
        )  # fmt: skip
        ax.axvspan(now, ends[-1], color=ALERT, alpha=0.15, linewidth=0, zorder=0)
    panels[-1].set_xlabel("time (s); shaded: computed, but not all there yet")
    return fig


def _range(first: int, last: int) -> str:
    return f"{first}–{last}" if last > first else f"{last}"


def _bar(
    ax: Axes, lane: int, begin: float, end: float, colour: str, text: int | str = "", beside: bool = False
) -> None:
    """A bar with a text in it, if there is room; if not, above it if `beside`."""
    low, high = ax.get_xlim()
    if end < low or begin > high:
        return
    width = max(end - begin, NARROWEST * (high - low))
    bar = Rectangle((begin, lane - 0.34), width, 0.68, facecolor=colour, edgecolor="white", linewidth=0.6)
    ax.add_patch(bar)
    left, right = max(begin, low), min(begin + width, high)
    fits = right - left > 0.011 * (high - low) * len(str(text))
    if text and (fits or beside):
        ink = FAINT if not fits else PAPER if colour == DECODE else INK
        middle, height = (left + right) / 2, lane if fits else lane - 0.5
        ax.text(middle, height, str(text), ha="center", va="center", fontsize=9, color=ink)


def _lanes(ax: Axes, names: Sequence[str]) -> None:
    ax.set_ylim(len(names) - 0.5, -0.6)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(labelsize=9.5)
    ax.spines[["top", "right"]].set_visible(False)


def _moments(ax: Axes, sampled: float, adopted: float) -> None:
    """From the first token to the moment at which the target goes on."""
    ax.plot([sampled, adopted], [LINK + 0.44] * 2, color=ALERT, linewidth=2, marker="|", markersize=10)
    ax.text(
        adopted, LINK + 0.36, f"{adopted - sampled:.1f} ms", ha="right", va="bottom", fontsize=9.5, color=ALERT,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}, zorder=4,
    )  # fmt: skip
