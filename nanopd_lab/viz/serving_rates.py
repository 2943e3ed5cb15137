"""Strategies over the request rate: percentiles, attainment, goodput, and what users and GPUs get of the tokens.

What was measured is drawn as marks with intervals, what was modelled as lines: both in one figure show how far to trust
the model where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from nanopd_lab.bench.bootstrap import Bounds, interval
from nanopd_lab.bench.metrics import Floats
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.bench.sweep import Row
from nanopd_lab.router.slo import Slo
from nanopd_lab.viz.serving import Tables, attainment, by_policy, logarithmic, tidy, words
from nanopd_lab.viz.strategies import Look, in_order, look_of
from nanopd_lab.viz.style import FAINT, INK, LabFigure, figure

TITLES = {"ttft": "TTFT from the schedule", "tpot": "TPOT", "e2e": "E2EL from the schedule"}
KEYS = {"ttft": "from_schedule_p{:g}_ttft", "tpot": "p{:g}_tpot", "e2e": "from_schedule_p{:g}_e2el"}
Figure = Callable[[Tables], Bounds]


def percentile_by_rate(
    tables: Tables,
    metric: str = "ttft",
    percents: Sequence[float] = (50, 90),
    slo: Slo | None = None,
    rows: Sequence[Row] = (),
) -> LabFigure:
    """A panel a percentile of `ttft`, `tpot` or `e2e`, over the rate.

    Args:
        slo: its objective is drawn
        rows: of a measured sweep, drawn as marks with intervals over its seeds

    Raises:
        ValueError: another metric, or no tables.
    """
    if metric not in TITLES:
        raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(TITLES)}")
    fig = figure(9.6, 4.2)
    panels = fig.subplots(1, len(percents), squeeze=False, sharey=True)[0]
    for ax, percent in zip(panels, percents, strict=True):

        def value(group: Tables, percent: float = percent) -> Bounds:
            values = np.concatenate([_values(table, metric) for table in group])
            return interval(1e3 * values, lambda rows: np.percentile(rows, percent, axis=-1))

        _draw(ax, tables, value)
        _draw_rows(ax, rows, f"{KEYS[metric].format(percent)}_ms")
        ax.set_title(f"p{percent:g}", loc="left", fontsize=11, color=INK)
        if slo is not None and np.isfinite(limit := getattr(slo, f"{metric}_s")):
            ax.axhline(1e3 * limit, color=INK, linewidth=1, linestyle="--")
    drawn = np.concatenate(
        [np.asarray(line.get_ydata(), float).ravel() for ax in panels for line in ax.lines]
    )
    drawn = drawn[np.isfinite(drawn) & (drawn > 0)]
    for ax in panels if len(drawn) else []:
        logarithmic(ax, "y", (0.7 * drawn.min(), 1.4 * drawn.max()))
    panels[0].set_ylabel(f"{TITLES[metric]} (ms)")
    _legend(fig, tables, rows=rows)
    return fig


def attainment_by_rate(tables: Tables, slo: Slo, rows: Sequence[Row] = ()) -> LabFigure:
    """Share of requests that met all objectives, over the rate; and how many a second and worker these are.

    Args:
        rows: of a sweep that was measured with these objectives, drawn as marks with intervals over its seeds
    """
    fig = figure(9.6, 4.2)
    share, good = fig.subplots(1, 2)
    _draw(share, tables, lambda group: attainment(group, slo))
    _draw_rows(share, rows, "attainment")
    share.axhline(0.9, color=FAINT, linestyle=":", linewidth=1)
    share.set_ylim(0, 1.03)
    share.yaxis.set_major_formatter(PercentFormatter(1.0))
    share.set_title("requests that met all objectives", loc="left", fontsize=11, color=INK)

    def per_worker(group: Tables) -> Bounds:
        found = attainment(group, slo)
        value = float(np.mean([table.goodput(slo) / table.workers for table in group]))
        factor = value / found.value if found.value else 0.0
        return Bounds(value, factor * found.low, factor * found.high)

    _draw(good, tables, per_worker)
    _draw_rows(good, rows, "request_goodput_per_gpu")
    good.set_ylim(bottom=0)
    good.set_title("goodput per worker (requests/s)", loc="left", fontsize=11, color=INK)
    _legend(fig, tables, f"within {words(slo)}", rows)
    return fig


def pareto(tables: Tables) -> LabFigure:
    """Output tokens a second and worker, against those that one user gets: right and up is better for both."""
    fig = figure(9.6, 4.4)
    ax = fig.add_subplot()
    for policy, group in by_policy(tables).items():
        look = look_of(policy)
        for modelled in (True, False):
            points = [(t.rate, *_speeds(t)) for t in group if t.modelled == modelled]
            if not points:
                continue
            points.sort()
            users, gpus = [p[1] for p in points], [p[2] for p in points]
            style = look.line if modelled else "none"
            ax.plot(
                users, gpus, linestyle=style, color=look.colour, linewidth=1.8, marker=look.marker,
                markersize=4 if modelled else 10, markeredgecolor="white" if modelled else INK,
            )  # fmt: skip
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens/s that a user gets after the first token (1 / median TPOT)")
    ax.set_ylabel("output tokens/s per worker")
    tidy(ax)
    _legend(fig, tables)
    return fig


def _speeds(table: RequestTable) -> tuple[float, float]:
    several = table.completed & (table.output_tokens > 1)
    tpot = float(np.median(table.tpot[several])) if several.any() else np.nan
    tokens = float(table.output_tokens[table.completed].sum())
    rate = tokens / table.duration / table.workers if table.duration else 0.0
    return 1 / tpot if tpot else np.nan, rate


def _values(table: RequestTable, metric: str) -> Floats:
    """Of completed requests; TPOT of those with several tokens."""
    several = table.completed & (table.output_tokens > 1) if metric == "tpot" else table.completed
    found: Floats = getattr(table, metric)[several]
    return found if len(found) else np.full(1, np.nan)


def _draw(ax: Axes, tables: Tables, value: Figure) -> None:
    for policy, group in by_policy(tables).items():
        look = look_of(policy)
        for modelled in (True, False):
            rates = sorted({table.rate for table in group if table.modelled == modelled})
            found = [value([t for t in group if t.rate == rate and t.modelled == modelled]) for rate in rates]
            if modelled and rates:
                ax.plot(rates, [b.value for b in found], look.line, color=look.colour, linewidth=2)
            elif rates:
                _marks(ax, rates, found, look)
    ax.set_xlabel("request rate (requests/s)")
    ax.set_xlim(left=0)
    tidy(ax)


def _draw_rows(ax: Axes, rows: Sequence[Row], metric: str) -> None:
    for row in rows:
        if (found := row.metrics.get(metric)) is not None:
            ends = (found.mean if end is None else end for end in (found.low, found.high))
            _marks(ax, [row.rate], [Bounds(found.mean, *ends)], look_of(row.policy))


def _marks(ax: Axes, rates: Sequence[float], found: Sequence[Bounds], look: Look) -> None:
    errors = [[max(0.0, b.value - b.low) for b in found], [max(0.0, b.high - b.value) for b in found]]
    ax.errorbar(
        rates, [b.value for b in found], yerr=errors, linestyle=look.line if len(rates) > 1 else "none",
        color=look.colour, ecolor=INK, elinewidth=1.2, capsize=4, marker=look.marker, markersize=9,
        markeredgecolor="white", zorder=3,
    )  # fmt: skip


def _legend(fig: LabFigure, tables: Tables, title: str = "", rows: Sequence[Row] = ()) -> None:
    policies = in_order([*by_policy(tables), *(row.policy for row in rows)])
    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, label=look.label)
        for look in map(look_of, policies)
    ]
    kinds = {table.modelled for table in tables} | ({False} if rows else set())
    if kinds == {True, False}:
        handles.append(Line2D([], [], color=INK, linestyle="none", marker="o", label="measured"))
        handles.append(Line2D([], [], color=INK, linewidth=2, label="modelled"))
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9.5)
    if kinds != {True, False}:
        title = ", ".join(filter(None, [title, "modelled" if kinds == {True} else "measured"]))
    if title:
        fig.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
