"""Policies beside each other: how many promises they keep, where each is best, and how far the best routes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nanopd_lab.bench.regret.tables import best_static, by_cell, of_oracle
from nanopd_lab.cost.files import read_json
from nanopd_lab.resources import data_dir
from nanopd_lab.router import Slo
from nanopd_lab.sim.results import SimResult
from nanopd_lab.viz.style import ALERT, FAINT, INK, LabFigure, figure, strategy_colour

ALIKE = 0.01  # shares of kept promises that differ by less are called equal


def race(
    results: Mapping[str, SimResult], slo: Slo, phases: Mapping[str, int], title: str, yours: str = "yours"
) -> LabFigure:
    """Goodput of each policy, and what share of the requests of each phase it serves as promised.

    Args:
        phases: requests of each part of the workload, in order
        yours: the learner's, drawn with an edge of its own
    """
    order = sorted(results, key=lambda name: results[name].goodput(slo))
    fig = figure(9.6, 1.4 + 0.34 * len(order))
    bars, parts = fig.subplots(1, 2, sharey=True, width_ratios=(1.15, 1))
    for row, name in enumerate(order):
        result = results[name]
        value = result.goodput(slo)
        bars.barh(row, value, color=strategy_colour(name), height=0.72)
        bars.text(
            value, row, f" {value:.1f}  ({result.attainment(slo):.0%})", va="center", fontsize=9.5, color=INK
        )
        done = 0
        for (_, count), marker in zip(phases.items(), "osD^v", strict=False):
            kept = sum(record.meets(slo) for record in result.records[done : done + count])
            parts.plot(
                100 * kept / count, row, marker, markersize=8, color=strategy_colour(name), markeredgecolor="white",
                markeredgewidth=0.8, clip_on=False,
            )  # fmt: skip
            done += count
    bars.set_yticks(range(len(order)), order)
    for label in bars.get_yticklabels():
        if label.get_text() == yours:
            label.set_fontweight("bold")
    bars.margins(x=0.22)
    bars.set_xlabel("goodput: requests/s that keep both promises")
    parts.set_xlim(-2, 102)
    parts.set_xlabel("kept (% of the phase's requests)")
    parts.grid(True, axis="both", alpha=0.25)
    handles = [
        Line2D([], [], linestyle="none", marker=marker, color=FAINT, markersize=8, label=name)
        for name, marker in zip(phases, "osD^v", strict=False)
    ]
    parts.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9.5
    )
    bars.set_title(title, loc="left", fontsize=11, color=INK)
    for ax in (bars, parts):
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def kept_shares(result: SimResult, ttfts_s: Sequence[float], tpots_s: Sequence[float]) -> np.ndarray:
    """[tpots, ttfts] share of the requests that would have kept such promises."""
    times = np.array(
        [
            (record.ttft_s, record.tpot_s or 0.0)
            if record.ok and record.ttft_s is not None
            else (np.inf, np.inf)
            for record in result.records
        ]
    )
    soon = times[:, 0][None, :] <= np.array(ttfts_s)[:, None]
    quick = times[:, 1][None, :] <= np.array(tpots_s)[:, None]
    return np.asarray((quick[:, None, :] & soon[None, :, :]).mean(axis=2))


def slo_plane(
    results: Mapping[str, SimResult], ttfts_s: Sequence[float], tpots_s: Sequence[float], title: str
) -> LabFigure:
    """Which policy keeps most promises, over what is promised; lines where the best keeps half and nine tenths.

    Args:
        results: of policies that do not look at what is promised, so that one run serves all promises
        ttfts_s, tpots_s: ascending
    """
    names = list(results)
    kept = np.array([kept_shares(results[name], ttfts_s, tpots_s) for name in names])
    best = kept.max(axis=0)
    alike = (kept >= best - ALIKE).sum(axis=0) > 1
    winner = np.where(alike, len(names), kept.argmax(axis=0))
    colours = [*_tints(names), "#EDEFF2"]
    fig = figure(9.6, 4.6)
    ax = fig.add_subplot()
    x, y = 1e3 * np.array(ttfts_s), 1e3 * np.array(tpots_s)
    ax.pcolormesh(
        x, y, winner, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) + 0.5, shading="nearest",
        rasterized=True,
    )  # fmt: skip
    handles = [
        Patch(
            facecolor=colour, edgecolor=FAINT, label=name if (winner == number).any() else f"{name}: nowhere"
        )
        for number, (name, colour) in enumerate(zip(names, colours, strict=False))
    ]
    handles.append(Patch(facecolor=colours[-1], edgecolor=FAINT, label=f"equal (within {ALIKE:.0%})"))
    for axis in ("x", "y"):
        getattr(ax, f"set_{axis}scale")("log")
    levels, edge = [50, 90], [Stroke(linewidth=3, foreground="white"), Normal()]
    if best.min() < 0.9 and best.max() > 0.5:
        lines = ax.contour(
            x, y, 100 * best, levels=levels, colors=INK, linewidths=1.2, linestyles=["--", "-"]
        )
        lines.set(path_effects=edge)
        for text in ax.clabel(lines, fmt=lambda value: f"{value:.0f} % kept", fontsize=9):
            text.set(path_effects=edge)
    _plain(ax)
    ax.set_xlabel("promised time to first token (ms)")
    ax.set_ylabel("promised time per token (ms)")
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    fig.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9.5, title="keeps most")
    return fig


def _tints(names: Sequence[str]) -> list[str]:
    """Colours of strategies; those that share one, such as several xPyD, from light to dark."""
    found = []
    for name in names:
        own = strategy_colour(name)
        alike = [other for other in names if strategy_colour(other) == own]
        shade = 2 * alike.index(name) / (len(alike) - 1) - 1 if len(alike) > 1 else 0.0
        rgb = np.array(to_rgb(own))
        tint = rgb * (1 - 0.6 * shade) if shade > 0 else rgb - 0.6 * shade * (1 - rgb)
        found.append(to_hex(tuple(tint.tolist())))
    return found


def _plain(ax: Axes) -> None:
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def recorded_regret() -> dict[str, Any] | None:
    """The newest result of `nanopd-lab regret` with the oracle in `data/recorded`; None: there is none."""
    found = [read_json(path) for path in (data_dir() / "recorded").glob("regret-h100-*.json")]
    return max(found, key=lambda record: str(record["provenance"][-1]["date"]), default=None)


def regret_view(record: Mapping[str, Any], title: str) -> LabFigure:
    """Goodput in percent of the best routes known, of each policy: over all cells, and in each.

    Args:
        record: of `nanopd-lab regret`
    """
    cells = by_cell(dict(record))
    names = [
        name for name in record["units"][0]["met"] if all(name in unit["met"] for unit in record["units"])
    ]
    share = {
        name: [of_oracle(units, lambda unit: unit["met"][name]) for units in cells.values()]  # noqa: B023
        for name in names
    }
    bests = [(units, best_static(units)) for units in cells.values()]
    share["best static"] = [of_oracle(units, lambda unit: unit["met"][best]) for units, best in bests]  # noqa: B023
    order = sorted(share, key=lambda name: float(np.mean(share[name])))
    fig = figure(9.6, 1.5 + 0.32 * len(order))
    bars, each = fig.subplots(1, 2, sharey=True, width_ratios=(1, 1.2))
    for row, name in enumerate(order):
        mean, worst = float(np.mean(share[name])), min(share[name])
        bars.barh(row, mean, color=INK if name == "best static" else strategy_colour(name), height=0.7)
        bars.plot(
            worst, row, "|", color=ALERT if name == "best static" else INK, markersize=13, markeredgewidth=2.5
        )
        bars.text(101, row, f"{100 - mean:.1f}", va="center", fontsize=9.5, color=INK)
    bars.text(101, len(order) - 0.45, "regret, %", fontsize=9, color=FAINT, va="bottom")
    bars.set_xlim(0, 100)
    bars.set_xlabel("% of the oracle's goodput (mean; |: worst cell)")
    bars.set_yticks(range(len(order)), order)
    grid = np.array([share[name] for name in order])
    rows, columns = (np.arange(size + 1) - 0.5 for size in grid.shape)
    shown = each.pcolormesh(columns, rows, grid, cmap="cividis", vmin=0, vmax=100, rasterized=True)
    fig.colorbar(shown, ax=each, label="% of the oracle's", pad=0.02)
    each.set_xlabel(f"each of {len(cells)} cells")
    each.set_xticks([])
    each.tick_params(length=0)
    each.set_ylim(-0.5, len(order) - 0.5)
    bars.set_title(title, loc="left", fontsize=11, color=INK)
    bars.spines[["top", "right"]].set_visible(False)
    return fig
