"""Strategies side by side, from the requests of their results: goodput, where the time goes, gaps between tokens.

All take tables of detailed results (`RequestTable.of(json)`); several of one strategy (seeds) are pooled. Intervals are
at 95 %, from blocks of requests drawn again (see `bench.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from nanopd_lab.bench.bootstrap import Bounds, interval, intervals
from nanopd_lab.bench.metrics import Floats
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.router.slo import Slo
from nanopd_lab.viz.strategies import Look, in_order, look_of
from nanopd_lab.viz.style import DECODE, FAINT, INK, KV, PREFILL, WAITING, LabFigure, figure

QUEUE = "#8C959F"
STAGE_LOOKS = {
    "queue": ("waits in the controller", WAITING, "///"),
    "prefill_queue": ("waits for its first chunk", QUEUE, ""),
    "prefill": ("prefill", PREFILL, ""),
    "transfer_visible": ("waits for its KV", KV, ""),
    "decode": ("decode", DECODE, ""),
}
SCALES = np.geomspace(0.25, 4.0, 81)
Tables = Sequence[RequestTable]


def by_policy(tables: Tables) -> dict[str, list[RequestTable]]:
    """The tables of each strategy, strategies in one order everywhere.

    Raises:
        ValueError: no tables.
    """
    if not tables:
        raise ValueError("there are no results to draw")
    return {
        policy: [table for table in tables if table.policy == policy]
        for policy in in_order([table.policy for table in tables])
    }


def source_of(tables: Tables) -> str:
    """Whether they were measured."""
    return "modelled" if all(table.modelled for table in tables) else "measured"


def attainment(tables: Tables, slo: Slo) -> Bounds:
    """Share of the judged requests of some runs that met the objectives. Raises ValueError: there is none."""
    return interval(_met(tables, slo))


def goodput_bars(tables: Tables, slo: Slo) -> LabFigure:
    """Requests a second and worker that met all objectives, and beside it the share of requests that did."""
    groups = by_policy(tables)
    fig = figure(9.6, 1.6 + 0.5 * len(groups))
    left, right = fig.subplots(1, 2, sharey=True)
    for row, (policy, group) in enumerate(groups.items()):
        look = look_of(policy)
        share = attainment(group, slo)
        each = sum(table.goodput(slo) for table in group) / len(group) / group[0].workers
        factor = each / share.value if share.value else 0.0
        _bar(left, row, Bounds(each, factor * share.low, factor * share.high), look, f"{each:.2f}")
        _bar(right, row, share, look, f"{share.value:.0%}")
    left.set_yticks(range(len(groups)), [look_of(policy).label for policy in groups])
    left.set_ylim(len(groups) - 0.5, -0.5)
    left.set_xlabel("goodput per worker (requests/s)")
    right.set_xlabel("requests that met all objectives")
    right.xaxis.set_major_formatter(PercentFormatter(1.0))
    right.set_xlim(0, 1.15)
    right.set_xticks(np.linspace(0, 1, 6))
    left.set_xlim(0, 1.25 * max(left.get_xlim()[1], 1e-9))
    for ax in (left, right):
        tidy(ax, "x")
    _title(fig, f"within {words(slo)} ({source_of(tables)})")
    return fig


def attainment_by_scale(tables: Tables, slo: Slo) -> LabFigure:
    """Share of requests in time while all objectives are made tighter (left) or looser (right) together."""
    fig = figure(9.6, 4.2)
    ax = fig.add_subplot()
    for policy, group in by_policy(tables).items():
        look = look_of(policy)
        met = np.stack([_met(group, scaled(slo, scale)) for scale in SCALES], axis=1)
        value, low, high = intervals(met)
        ax.fill_between(SCALES, low, high, color=look.colour, alpha=0.18, linewidth=0)
        ax.plot(
            SCALES, value, look.line, color=look.colour, linewidth=2.2, label=look.label,
            marker=look.marker, markevery=(5, 10), markersize=6, markeredgecolor="white",
        )  # fmt: skip
    ax.axvline(1, color=INK, linewidth=1)
    ax.axhline(0.9, color=FAINT, linestyle=":", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks([0.25, 0.5, 1, 2, 4], ["× ¼", "× ½", "as set", "× 2", "× 4"])
    ax.set_xlim(SCALES[0], SCALES[-1])
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel(f"objectives; as set: {words(slo)}")
    ax.set_ylabel("requests that met all objectives")
    ax.legend(loc="lower right", frameon=False, fontsize=10)
    tidy(ax)
    _title(fig, f"the line at 90 % is where a service is mostly said to hold ({source_of(tables)})")
    return fig


def latency_breakdown(tables: Tables) -> LabFigure:
    """Where the time of a completed request goes, on average: the parts add up to its E2EL from the schedule."""
    groups = by_policy(tables)
    fig = figure(9.6, 2.0 + 0.5 * len(groups))
    ax = fig.add_subplot()
    longest = 0.0
    for row, group in enumerate(groups.values()):
        left = 0.0
        for stage, (_, colour, hatch) in STAGE_LOOKS.items():
            values = np.concatenate([table.stages[stage][table.completed] for table in group])
            width = 1e3 * float(np.nanmean(values)) if not np.isnan(values).all() else 0.0
            ax.barh(
                row, width, left=left, height=0.66, color=colour, hatch=hatch, edgecolor="white", linewidth=0
            )
            left += width
        ax.annotate(
            f"{left:,.0f}", (left, row), textcoords="offset points", xytext=(6, -4), fontsize=10, color=INK
        )
        longest = max(longest, left)
    ax.set_xlim(0, 1.1 * longest if longest else 1.0)
    ax.set_yticks(range(len(groups)), [look_of(policy).label for policy in groups])
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_xlabel("mean time of a request (ms)")
    tidy(ax, "x")
    handles = [
        Patch(facecolor=c, hatch=h, edgecolor="white", label=label) for label, c, h in STAGE_LOOKS.values()
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9.5)
    _title(fig, source_of(tables))
    return fig


def itl_distribution(tables: Tables, tpot_s: float = np.inf) -> LabFigure:
    """Share of the gaps between tokens that are longer than what the axis says: the tail is what readers notice.

    Args:
        tpot_s: objective to draw

    Raises:
        ValueError: no gap was stamped (a simulation stamps none).
    """
    groups = {policy: np.concatenate([t.gaps for t in group]) for policy, group in by_policy(tables).items()}
    groups = {policy: 1e3 * np.sort(gaps) for policy, gaps in groups.items() if len(gaps)}
    if not groups:
        raise ValueError(
            "no result has the gaps between tokens; only measured ones have, with --save-detailed"
        )
    fig = figure(9.6, 4.2)
    ax = fig.add_subplot()
    for policy, gaps in groups.items():
        look = look_of(policy)
        shares, values = _tail(gaps)
        ax.step(values, shares, look.line, where="post", color=look.colour, linewidth=2.2, label=look.label)
    if np.isfinite(tpot_s):
        ax.axvline(1e3 * tpot_s, color=INK, linewidth=1, linestyle="--")
        ax.annotate(f" TPOT objective {1e3 * tpot_s:,.0f}", (1e3 * tpot_s, 0.75), fontsize=9.5, color=INK)
    low = min(
        float(np.quantile(gaps, 0.05)) for gaps in groups.values()
    )  # bursts that come together are no news
    logarithmic(ax, "x", (max(low / 1.2, 1e-3), 1.2 * max(float(gaps[-1]) for gaps in groups.values())))
    logarithmic(ax, "y", (1e-3, 1.05))
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.1%}" if value < 0.01 else f"{value:.0%}")
    )
    ax.set_xlabel("gap between two tokens (ms)")
    ax.set_ylabel("gaps that are longer")
    ax.legend(loc="lower left", frameon=False, fontsize=10)
    tidy(ax)
    _title(fig, "measured")
    return fig


def _met(tables: Tables, slo: Slo) -> Floats:
    """1 for each judged request that met the objectives, 0 for the others."""
    return np.concatenate([table.met(slo)[table.judged] for table in tables]).astype(np.float64)


def scaled(slo: Slo, scale: float) -> Slo:
    """All objectives times `scale`."""
    return Slo(*(scale * value for value in slo))


def words(slo: Slo) -> str:
    """The objectives for people."""
    names = ("TTFT", "TPOT", "E2EL")
    given = [
        f"{n} ≤ {1e3 * value:,.0f} ms" for n, value in zip(names, slo, strict=True) if np.isfinite(value)
    ]
    return ", ".join(given) or "no objective"


def tidy(ax: Axes, axis: str = "both") -> None:
    """Faint grid, no frame."""
    ax.grid(True, axis=axis, alpha=0.25)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=10)


def logarithmic(ax: Axes, axis: str, limits: tuple[float, float]) -> None:
    """Logarithmic between the limits, with plain numbers (50 and not 5·10¹)."""
    getattr(ax, f"set_{axis}scale")("log")
    getattr(ax, f"set_{axis}lim")(limits)
    found = getattr(ax, f"{axis}axis")
    found.set_major_locator(LogLocator(subs=(1,) if limits[1] / limits[0] > 90 else (1, 2, 5)))
    found.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    found.set_minor_formatter(NullFormatter())


def _bar(ax: Axes, row: int, bounds: Bounds, look: Look, text: str) -> None:
    ax.barh(row, bounds.value, height=0.62, color=look.colour)
    errors = [[max(0.0, bounds.value - bounds.low)], [max(0.0, bounds.high - bounds.value)]]
    ax.errorbar(bounds.value, row, xerr=errors, color=INK, capsize=4, linewidth=1.2)
    ax.annotate(
        text, (max(bounds.high, bounds.value), row), textcoords="offset points", xytext=(7, -4), fontsize=10,
        color=INK,
    )  # fmt: skip


def _tail(gaps: Floats, most: int = 400) -> tuple[Floats, Floats]:
    """(shares, values) of at most so many points, dense where the tail is."""
    shares = np.unique(np.concatenate([np.linspace(0, 1, most // 2), np.geomspace(1e-4, 1, most // 2)]))
    return shares[::-1], np.quantile(gaps, 1 - shares[::-1])


def _title(fig: LabFigure, text: str) -> None:
    fig.suptitle(text, fontsize=11, color=INK, x=0.01, ha="left")
