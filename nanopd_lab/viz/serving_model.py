"""What the simulator says of a run beside what was measured, and how far strategies stay behind hindsight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FuncFormatter

from nanopd_lab.viz.serving import tidy
from nanopd_lab.viz.strategies import in_order, look_of
from nanopd_lab.viz.style import FAINT, INK, PAPER, LabFigure, figure

BAND = 0.1
MOST = 0.6  # of the axis of differences; what is beyond is drawn on its edge
COMPARED = {
    "median_ttft_ms": "TTFT p50",
    "p90_ttft_ms": "TTFT p90",
    "median_tpot_ms": "TPOT p50",
    "p90_tpot_ms": "TPOT p90",
    "median_e2el_ms": "E2EL p50",
    "p90_e2el_ms": "E2EL p90",
    "output_throughput": "output tokens/s",
}
Result = Mapping[str, Any]
Pairs = Sequence[tuple[Result, Result]]  # measured, simulated


def differences(pairs: Pairs) -> dict[str, dict[str, float]]:
    """Simulated / measured - 1 by strategy and figure; without what one of both lacks.

    Raises:
        ValueError: a pair is of two strategies.
    """
    found: dict[str, dict[str, float]] = {}
    for measured, simulated in pairs:
        policy = measured["pd"]["policy"]
        if simulated["pd"]["policy"] != policy:
            raise ValueError(
                f"{policy} measured beside {simulated['pd']['policy']} simulated; pair the same strategy"
            )
        found[policy] = {
            key: simulated[key] / measured[key] - 1
            for key in COMPARED
            if measured.get(key) and simulated.get(key) is not None
        }
    return found


def simulated_vs_measured(pairs: Pairs) -> LabFigure:
    """A row a figure, a mark a strategy: how far the simulator is from what was measured. The band is ±10 %."""
    rows = differences(pairs)
    fig = figure(9.6, 4.4)
    ax = fig.add_subplot()
    ax.axvspan(-BAND, BAND, color=FAINT, alpha=0.18, linewidth=0)
    ax.axvline(0, color=INK, linewidth=1)
    names = list(COMPARED)
    order = in_order(list(rows))
    for number, policy in enumerate(order):
        look = look_of(policy)
        shift = 0.22 * (number - (len(order) - 1) / 2)
        places = [names.index(key) + shift for key in rows[policy]]
        values = np.clip(list(rows[policy].values()), -MOST, MOST)
        ax.plot(
            values, places, linestyle="none", marker=look.marker, markersize=9, color=look.colour,
            markeredgecolor="white", label=look.label, clip_on=False, zorder=3,
        )  # fmt: skip
    ax.set_yticks(range(len(names)), list(COMPARED.values()))
    ax.set_ylim(len(names) - 0.5, -0.5)
    widest = max((abs(v) for each in rows.values() for v in each.values()), default=BAND)
    ax.set_xlim(-min(MOST, max(0.3, 1.1 * widest)), min(MOST, max(0.3, 1.1 * widest)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0%}" if value else "as measured"))
    ax.set_xlabel("simulated is shorter or less (−), longer or more (+)")
    tidy(ax)
    fig.legend(loc="outside lower center", ncols=max(1, len(order)), frameon=False, fontsize=10)
    inside = [abs(v) <= BAND for each in rows.values() for v in each.values()]
    fig.suptitle(
        f"the same requests, simulated with the fitted model: {sum(inside)} of {len(inside)} figures within ±10 %",
        fontsize=11, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    return fig


def pays_map(
    rates: Sequence[float],
    rows: Sequence[str],
    gain: Sequence[Sequence[float]],
    title: str,
    names: tuple[str, str],
) -> LabFigure:
    """Where the second of two strategies has more requests in time than the first, in points; modelled.

    Args:
        rates: requests a second, of the columns
        rows: what is served, for people
        gain: [row][rate], from -1 to 1
        names: of both strategies
    """
    values = 100 * np.array(gain)
    fig = figure(9.6, 1.9 + 0.42 * len(rows))
    ax = fig.add_subplot()
    first, second = (look_of(name) for name in names)
    colours = LinearSegmentedColormap.from_list("pays", [first.colour, PAPER, second.colour])
    ax.pcolormesh(
        np.arange(len(rates) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5, values, cmap=colours, vmin=-40, vmax=40,
        edgecolors="white", linewidth=1,
    )  # fmt: skip
    for (row, column), value in np.ndenumerate(values):
        ax.text(column, row, f"{value:+.0f}", ha="center", va="center", fontsize=10, color="#1F2328")
    ax.set_xticks(range(len(rates)), [f"{rate:.3g}" for rate in rates])
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("request rate (requests/s)")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=10)
    fig.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return fig


def regret(shares: Mapping[str, Sequence[float]], oracle: Sequence[float]) -> LabFigure:
    """How many points of requests in time each strategy lacks to the best routes in hindsight, cell by cell; modelled.

    Args:
        shares: attainment of each strategy in each cell, the same cells in one order
        oracle: of the oracle in each cell

    Raises:
        ValueError: not a share for each cell.
    """
    if wrong := [name for name, each in shares.items() if len(each) != len(oracle)]:
        raise ValueError(
            f"{wrong[0]} has {len(shares[wrong[0]])} cells, the oracle {len(oracle)}; give the same cells"
        )
    fig = figure(9.6, 1.5 + 0.5 * len(shares))
    ax = fig.add_subplot()
    rng = np.random.default_rng(0)
    for row, policy in enumerate(order := in_order(list(shares))):
        look = look_of(policy)
        values = 100 * (np.asarray(oracle) - np.asarray(shares[policy]))
        ax.plot(
            values, row + rng.uniform(-0.2, 0.2, len(values)), linestyle="none", marker=look.marker, markersize=5,
            color=look.colour, alpha=0.6, markeredgewidth=0,
        )  # fmt: skip
        mean = float(values.mean())
        ax.plot([mean, mean], [row - 0.36, row + 0.36], color=INK, linewidth=2.5)
        ax.annotate(
            f"{mean:.1f}", (mean, row - 0.36), textcoords="offset points", xytext=(4, 1), fontsize=9.5
        )
    ax.set_yticks(range(len(order)), [look_of(policy).label for policy in order])
    ax.set_ylim(len(order) - 0.4, -0.6)
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_xlabel("regret: points of requests in time fewer than the oracle's")
    tidy(ax, "x")
    fig.suptitle(
        f"{len(oracle)} cells, a mark each; bar: mean (modelled)", fontsize=11, color=INK, x=0.01, ha="left"
    )
    return fig
