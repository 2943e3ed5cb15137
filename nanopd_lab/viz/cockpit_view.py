"""A serving cluster at one moment of a recording, and how it came there: queues, batches, KV, routes, and whether
promises are kept.

cockpit_view(Recording.of(result), time_s=3.5)     # of a finished run, or of what a cockpit has recorded
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nanopd_lab.bench.frames import Frame, WorkerFrame
from nanopd_lab.bench.recording import Recording
from nanopd_lab.viz.serving import tidy, words
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, KV, PREFILL, WAITING, LabFigure, figure

MOST_WORKERS = 16  # bars of more cannot be read
MOST_ROUTES = 6
MOST_DOTS = 2000
PHASES = (
    ("waiting", "waits", WAITING, "///"),
    ("prefilling", "prefill", PREFILL, ""),
    ("awaited", "waits for its KV", KV, ""),
    ("decoding", "decode", DECODE, ""),
)
Points = Sequence[tuple[float, float, bool]]


def cockpit_view(recording: Recording, time_s: float | None = None) -> LabFigure:
    """The moment `time_s` (None: the last). Axes are those of the whole recording, so that moments can be compared.

    Left, at this moment: requests at each worker by what they do there, its KV, and routes taken so far. Right, until
    then: requests, TTFT and TPOT (a dot a request, as it ended; a cross: missed; a line: rolling median), goodput.
    """
    time_s = recording.duration_s if time_s is None else time_s
    frame = recording.at(time_s)
    past = recording.frames[: recording.index(time_s) + 1]
    names = min(len(frame.workers), MOST_WORKERS)
    fig = figure(9.6, 5.2 + 0.22 * max(0, names - 4))
    grid = fig.add_gridspec(4, 3, width_ratios=[1.15, 0.7, 2.0])
    work, kv, routes = (
        fig.add_subplot(grid[:3, 0]),
        fig.add_subplot(grid[:3, 1]),
        fig.add_subplot(grid[3, :2]),
    )
    right = [fig.add_subplot(grid[row, 2]) for row in range(4)]
    _work(work, recording, frame)
    _kv(kv, recording, frame)
    _routes(routes, recording, frame)
    _requests(right[0], recording, past)
    until = [end for end in recording.ends if end.time_s <= frame.time_s][-MOST_DOTS:]
    for ax, name, limit_s in (
        (right[1], "ttft_s", recording.slo.ttft_s),
        (right[2], "tpot_s", recording.slo.tpot_s),
    ):
        dots = [(end.time_s, getattr(end, name), end.met(recording.slo)) for end in until if end.ok]
        _latency(ax, name, recording, past, dots, limit_s)
    _goodput(right[3], recording, past)
    for ax in right:
        ax.set_xlim(0, max(recording.duration_s, 1e-3))
        ax.axvline(time_s, color=INK, linewidth=0.8, alpha=0.5)
        tidy(ax)
        ax.tick_params(labelsize=9, labelbottom=ax is right[3])
    fig.align_ylabels(right)
    right[3].set_xlabel("time since the begin (s)", fontsize=10)
    promised = f"; within {words(recording.slo)}" if recording.slo.given else ""
    fig.suptitle(
        f"{recording.title}: at {time_s:.2f} s; lines look back over {recording.window_s:.2g} s{promised}",
        fontsize=10.5, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    return fig


def phase_counts(worker: WorkerFrame) -> list[int]:
    """Of `PHASES`, in that order."""
    return [getattr(worker, name) for name, *_ in PHASES]


def shown_workers(frame: Frame) -> Sequence[WorkerFrame]:
    """The first of them."""
    return frame.workers[:MOST_WORKERS]


def _work(ax: Axes, recording: Recording, frame: Frame) -> None:
    workers = shown_workers(frame)
    ax.barh(-1, frame.queued, height=0.66, color=WAITING, hatch="///", edgecolor="white", linewidth=0)
    left = np.zeros(len(workers))
    for name, label, colour, hatch in PHASES:
        counts = np.array([getattr(worker, name) for worker in workers])
        ax.barh(
            range(len(workers)), counts, left=left, height=0.66, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0, label=label,
        )  # fmt: skip
        left += counts
    labels = [
        f"{each.name}: {each.role}" if len(workers) > 6 else f"{each.name}\n{each.role}" for each in workers
    ]
    ax.set_yticks(range(-1, len(workers)), ["queue", *labels])
    ax.set_ylim(len(workers) - 0.4, -1.6)
    most = max(
        max([each.queued, *(sum(phase_counts(worker)) for worker in shown_workers(each))])
        for each in recording.frames
    )
    ax.set_xlim(0, max(1, most) * 1.05)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    more = len(frame.workers) - len(workers)
    ax.set_xlabel("requests" + (f" ({more} workers more)" if more else ""), fontsize=10)
    tidy(ax, "x")
    ax.tick_params(labelsize=9)
    ax.legend(
        loc="lower left", bbox_to_anchor=(-0.3, 1.0), ncols=4, frameon=False, fontsize=8.5, handlelength=1,
        columnspacing=0.9, handletextpad=0.4, borderaxespad=0.2,
    )  # fmt: skip


def _kv(ax: Axes, recording: Recording, frame: Frame) -> None:
    workers = shown_workers(frame)
    shares = all(worker.kv_total for worker in workers)
    used = [100 * w.kv_used / w.kv_total if shares else w.kv_used for w in workers]
    ax.barh(range(len(workers)), used, height=0.66, color=KV)
    most = max(worker.kv_used for each in recording.frames for worker in shown_workers(each))
    ax.set_xlim(0, 100 if shares else max(1.0, most) * 1.05)
    ax.set_ylim(len(workers) - 0.4, -1.6)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(3))
    ax.set_xlabel(
        "KV blocks in use (%)" if shares else f"KV ({recording.kv_unit.split(',')[0]})", fontsize=10
    )
    tidy(ax, "x")
    ax.tick_params(labelsize=9)


def _routes(ax: Axes, recording: Recording, frame: Frame) -> None:
    last = recording.frames[-1].routes
    names = sorted(last, key=lambda name: (-last[name], name))[:MOST_ROUTES]
    counts = [frame.routes.get(name, 0) for name in names]
    colours = [DECODE if "→" in name else PREFILL if name else FAINT for name in names]
    ax.barh(range(len(names)), counts, height=0.66, color=colours)
    for row, count in enumerate(counts):
        ax.annotate(
            f"{count}", (count, row), textcoords="offset points", xytext=(4, -3), fontsize=9, color=INK
        )
    ax.set_yticks(range(len(names)), [name or "none" for name in names])
    ax.set_ylim(max(len(names), 1) - 0.4, -0.6)
    ax.set_xlim(0, max(1, *last.values(), 1) * 1.15)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    others = len(last) - len(names)
    ax.set_xlabel("ended, by route" + (f" ({others} routes more)" if others > 0 else ""), fontsize=10)
    tidy(ax, "x")
    ax.tick_params(labelsize=9)


def _requests(ax: Axes, recording: Recording, past: Sequence[Frame]) -> None:
    times = [frame.time_s for frame in past]
    sent = [frame.sent for frame in past]
    ended = [frame.completed + frame.failed for frame in past]
    ax.fill_between(times, ended, sent, color=WAITING, alpha=0.6, linewidth=0, label="running")
    ax.plot(times, sent, color=INK, linewidth=1.6, label="sent")
    ax.plot(times, ended, color=DECODE, linewidth=1.6, linestyle="--", label="ended")
    if past[-1].failed:
        ax.plot(times, [frame.failed for frame in past], color=ALERT, linewidth=1.6, label="failed")
    ax.set_ylim(0, max(1, recording.frames[-1].sent) * 1.08)
    ax.set_ylabel("requests", fontsize=10)
    ax.legend(loc="upper left", frameon=False, fontsize=8.5, ncols=4, handlelength=1.4, borderaxespad=0.1)


def _latency(
    ax: Axes, name: str, recording: Recording, past: Sequence[Frame], dots: Points, limit_s: float
) -> None:
    colour = PREFILL if name == "ttft_s" else DECODE
    values = [1e3 * value for end in recording.ends if end.ok and (value := getattr(end, name)) is not None]
    high = float(np.percentile(values, 98)) if values else 1.0
    if np.isfinite(limit_s):
        ax.axhline(1e3 * limit_s, color=INK, linewidth=1, linestyle="--")
        high = min(max(high, 1e3 * limit_s), 4e3 * limit_s)
    top = 1.2 * max(high, 1e-3)
    ax.set_ylim(0, top)
    for met, marker, shade in ((True, "o", colour), (False, "x", ALERT)):
        # An outlier must not flatten the rest: it is drawn at the edge.
        chosen = [(time, min(1e3 * value, top)) for time, value, good in dots if good == met]
        if chosen:
            x, y = zip(*chosen, strict=True)
            ax.plot(
                x, y, linestyle="none", marker=marker, markersize=3.2, color=shade, alpha=0.7, clip_on=False
            )
    lines = [(frame.time_s, getattr(frame.rolling, name)) for frame in past]
    ax.plot(
        [time for time, _ in lines],
        [np.nan if value is None else 1e3 * value for _, value in lines],
        color=INK,
        linewidth=1.6,
    )
    ax.set_ylabel(f"{name.removesuffix('_s').upper()} (ms)", fontsize=10)


def _goodput(ax: Axes, recording: Recording, past: Sequence[Frame]) -> None:
    times = [frame.time_s for frame in past]
    ax.plot(times, [frame.rolling.completed for frame in past], color=FAINT, linewidth=1.4, label="completed")
    good = [frame.rolling.goodput for frame in past]
    label = "in time" if recording.slo.given else "in time (no objective is set)"
    ax.plot(times, good, color=KV, linewidth=2, label=label)
    ax.fill_between(times, 0, good, color=KV, alpha=0.2, linewidth=0)
    ax.set_ylim(0, 1.35 * max(max(frame.rolling.completed for frame in recording.frames), 1e-3))
    ax.set_ylabel("requests/s", fontsize=10)
    ax.legend(loc="upper left", frameon=False, fontsize=8.5, ncols=2, handlelength=1.4, borderaxespad=0.1)
