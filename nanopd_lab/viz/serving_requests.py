"""One dot or one bar a request: which objective it missed, and what it waited for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from nanopd_lab.bench.metrics import Floats
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.router.slo import Slo
from nanopd_lab.viz.serving import (
    STAGE_LOOKS,
    Tables,
    attainment,
    by_policy,
    logarithmic,
    source_of,
    tidy,
    words,
)
from nanopd_lab.viz.strategies import look_of
from nanopd_lab.viz.style import ALERT, FAINT, INK, PAPER, LabFigure, figure

LEVEL = 0.01  # strategies whose shares differ by less are level


def request_timeline(tables: Tables, slo: Slo, most: int = 40) -> LabFigure:
    """A panel a strategy, on one time axis: each of its first `most` requests as a bar from when it was to be sent.

    Those that missed an objective end with a cross. Only the first run of each strategy is drawn.
    """
    groups = {policy: group[0] for policy, group in by_policy(tables).items()}
    rows = min(most, max(len(table) for table in groups.values()))
    fig = figure(9.6, 1.2 + (0.5 + 0.085 * rows) * len(groups))
    panels = fig.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (policy, table) in zip(panels, groups.items(), strict=True):
        missed = _bars(ax, table, slo, rows)
        ax.set_title(
            f"{look_of(policy).label}: {missed} of the first {rows} requests missed an objective",
            loc="left", fontsize=10.5, color=INK,
        )  # fmt: skip
        ax.set_ylim(rows - 0.3, -0.7)
        ax.set_yticks([])
        ax.set_ylabel("requests", fontsize=10)
        tidy(ax, "x")
    panels[-1].set_xlabel("time since the begin of the run (s)")
    panels[-1].set_xlim(left=0)
    handles: list[Patch | Line2D] = [
        Patch(facecolor=c, hatch=h, edgecolor="white", label=label) for label, c, h in STAGE_LOOKS.values()
    ]
    handles.append(
        Line2D([], [], color=ALERT, linestyle="none", marker="x", markeredgewidth=1.6, label="missed")
    )
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return fig


def _bars(ax: Axes, table: RequestTable, slo: Slo, rows: int) -> int:
    met, missed = table.met(slo), 0
    for row in range(min(rows, len(table))):
        left = table.scheduled[row]
        for stage, (_, colour, hatch) in STAGE_LOOKS.items():
            width = table.stages[stage][row]
            if np.isnan(width):
                break
            ax.barh(
                row, width, left=left, height=0.8, color=colour, hatch=hatch, edgecolor="white", linewidth=0
            )
            left += width
        if table.judged[row] and not met[row]:
            missed += 1
            ax.plot(left, row, marker="x", color=ALERT, markersize=5, markeredgewidth=1.6, clip_on=False)
    return missed


def slo_plane(tables: Tables, slo: Slo) -> LabFigure:
    """A panel a strategy: each request by its TTFT and TPOT; those in the shaded corner met both objectives."""
    groups = by_policy(tables)
    fig = figure(9.6, 3.9)
    panels = fig.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    every = [(1e3 * t.ttft[t.completed], 1e3 * t.tpot[t.completed]) for t in tables]
    x_limits, y_limits = (_limits(np.concatenate(each)) for each in zip(*every, strict=True))
    for ax, (policy, group) in zip(panels, groups.items(), strict=True):
        look = look_of(policy)
        for axis, limits in (("x", x_limits), ("y", y_limits)):
            logarithmic(ax, axis, limits)
        ttft, tpot = (
            min(1e3 * limit, high) for limit, high in ((slo.ttft_s, x_limits[1]), (slo.tpot_s, y_limits[1]))
        )
        ax.add_patch(
            Rectangle(
                (x_limits[0], y_limits[0]),
                ttft - x_limits[0],
                tpot - y_limits[0],
                color=FAINT,
                alpha=0.18,
                lw=0,
            )
        )
        for table in group:
            met = table.met(slo)
            for flags, face in ((met, look.colour), (table.completed & ~met, PAPER)):
                ax.plot(
                    1e3 * table.ttft[flags], 1e3 * table.tpot[flags], linestyle="none", marker=look.marker,
                    markersize=5, color=look.colour, markerfacecolor=face, markeredgewidth=0.8, alpha=0.85,
                )  # fmt: skip
        share = attainment(group, slo)
        dropped = sum(int((table.judged & ~table.completed).sum()) for table in group)
        ax.set_title(
            f"{look.label}: {share.value:.0%}" + (f"\n{dropped} failed, not drawn" if dropped else ""),
            loc="left", fontsize=10.5, color=INK,
        )  # fmt: skip
        ax.set_xlabel("TTFT (ms)")
        tidy(ax)
    panels[0].set_ylabel("TPOT (ms)")
    fig.suptitle(
        f"within {words(slo)}; hollow: missed ({source_of(tables)})",
        fontsize=11,
        color=INK,
        x=0.01,
        ha="left",
    )
    return fig


def winners(tables: Tables, slo: Slo, points: int = 48) -> LabFigure:
    """Which strategy has most requests in time, for every pair of objectives; the paler, the smaller its lead.

    White: all have (nearly) none; grey: they are level. The cross is at `slo`. From the same requests of each.
    """
    groups = by_policy(tables)
    every = [(t.ttft[t.completed], t.tpot[t.completed]) for t in tables]
    x, y = (np.geomspace(*_limits(np.concatenate(each)), points) for each in zip(*every, strict=True))
    shares = np.array([_shares(group, x, y, slo.e2e_s) for group in groups.values()])
    fig = figure(9.6, 4.4)
    ax = fig.add_subplot()
    ax.pcolormesh(
        1e3 * x,
        1e3 * y,
        _colours(shares, [look_of(p).colour for p in groups]),
        shading="nearest",
        rasterized=True,
    )
    for axis, values in (("x", x), ("y", y)):
        logarithmic(ax, axis, (1e3 * values[0], 1e3 * values[-1]))
    ax.plot(1e3 * slo.ttft_s, 1e3 * slo.tpot_s, marker="P", markersize=13, color=INK, markeredgecolor=PAPER)
    ax.set_xlabel("TTFT objective (ms)")
    ax.set_ylabel("TPOT objective (ms)")
    tidy(ax)
    ax.grid(False)
    handles = [
        Patch(facecolor=look_of(p).colour, label=f"{look_of(p).label} has most in time") for p in groups
    ]
    handles.append(Patch(facecolor="#D8DCE0", label="level"))
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9.5)
    fig.suptitle(
        f"at one request rate ({source_of(tables)}); cross: {words(slo)}",
        fontsize=11,
        color=INK,
        x=0.01,
        ha="left",
    )
    return fig


def _shares(group: Sequence[RequestTable], x: Floats, y: Floats, e2e_s: float) -> Floats:
    """Attainment for each pair of a TTFT and a TPOT objective: [y, x]."""
    ttft = np.concatenate([np.where(t.e2e <= e2e_s, t.ttft, np.nan)[t.judged] for t in group])
    tpot = np.concatenate([t.tpot[t.judged] for t in group])
    met = (ttft[None, None] <= x[None, :, None]) & (tpot[None, None] <= y[:, None, None])
    return met.mean(axis=-1)


def _colours(shares: Floats, colours: Sequence[str]) -> Floats:
    """[y, x, rgb] of shares [strategy, y, x]: a lead of a fifth has the full colour."""
    order = np.sort(shares, axis=0)
    lead = order[-1] - order[-2] if len(shares) > 1 else order[-1]
    full = np.array([to_rgb(colour) for colour in colours])[shares.argmax(axis=0)]
    strength = (0.25 + 0.75 * np.clip(lead / 0.2, 0, 1))[..., None]
    found = strength * full + (1 - strength) * np.array(to_rgb(PAPER))
    found[lead < LEVEL] = to_rgb("#D8DCE0")
    found[order[-1] < LEVEL] = to_rgb(PAPER)
    return found


def _limits(values: Floats) -> tuple[float, float]:
    values = values[values > 0]
    return (0.8 * float(values.min()), 1.25 * float(values.max())) if len(values) else (1.0, 10.0)
