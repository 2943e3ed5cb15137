"""When requests were to come, when they were sent, and what that does to what is counted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nanopd_lab.bench.metrics import Floats
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.router.slo import Slo
from nanopd_lab.viz.serving import logarithmic, tidy
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, WAITING, LabFigure, figure


def arrivals_view(tables: Mapping[str, RequestTable], slo: Slo, title: str = "") -> LabFigure:
    """A panel a run, by its name: above, each request at its time with its TTFT; below, when they came.

    Args:
        slo: its TTFT is drawn, and what is above it counted
    """
    fig = figure(9.6, 3.7)
    top, bottom = fig.subplots(2, len(tables), squeeze=False, sharex=True, height_ratios=(5, 1))
    every = np.concatenate([1e3 * table.ttft[table.completed] for table in tables.values()])
    limits = (0.7 * float(every.min()), 1.5 * float(every.max())) if len(every) else (1.0, 10.0)
    for above, below, (name, table) in zip(top, bottom, tables.items(), strict=True):
        ttft, late = 1e3 * table.ttft, table.ttft > slo.ttft_s
        for flags, colour in ((~late, DECODE), (late, ALERT)):
            above.plot(table.scheduled[flags], ttft[flags], ".", markersize=5, color=colour)
        above.axhline(1e3 * slo.ttft_s, color=INK, linewidth=1, linestyle="--")
        logarithmic(above, "y", limits)
        kept = float(table.met(Slo(slo.ttft_s))[table.judged].mean())
        above.set_title(f"{name}: {kept:.0%} in time", loc="left", fontsize=10.5, color=INK)
        below.vlines(table.scheduled, 0, 1, color=INK, linewidth=0.6)
        below.set_yticks([])
        below.set_xlabel("time (s)")
        below.spines[["top", "right", "left"]].set_visible(False)
        tidy(above)
    for above in top[1:]:
        above.tick_params(labelleft=False)
    top[0].set_ylabel("TTFT (ms)")
    bottom[0].set_ylabel("arrivals", fontsize=9)
    fig.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return fig


def omission_view(tables: Mapping[str, RequestTable], title: str = "") -> LabFigure:
    """A panel a run: each request's TTFT from when it was to be sent (full), and from when it was (hollow).

    The line between them is what who waited knows and a clock that starts with the sending leaves out (coordinated
    omission). p90 of both in the title.
    """
    fig = figure(9.6, 3.9)
    panels = fig.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for ax, (name, table) in zip(panels, tables.items(), strict=True):
        done = table.completed
        x, full = table.scheduled[done], 1e3 * table.ttft[done]
        sent = full - 1e3 * table.late[done]
        ax.vlines(x, sent, full, color=WAITING, linewidth=2)
        ax.plot(x, full, "o", markersize=6, color=DECODE, label="from the schedule")
        ax.plot(x, sent, "o", markersize=6, color=DECODE, markerfacecolor="white", label="from the sending")
        ax.set_title(
            f"{name}\np90 {_p90(full)} ms from the schedule, {_p90(sent)} from the sending",
            loc="left", fontsize=10, color=INK,
        )  # fmt: skip
        ax.set_xlabel("to be sent at (s)")
        ax.set_xlim(left=0)
        tidy(ax)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("TTFT (ms)")
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    fig.suptitle(title, fontsize=11, color=FAINT, x=0.01, ha="left")
    return fig


def _p90(values: Floats) -> str:
    return f"{np.percentile(values, 90):,.0f}" if len(values) else "–"
