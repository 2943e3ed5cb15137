"""What the simulator says of a run beside what was measured, and of what was not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from nanopd_lab.viz.serving import tidy
from nanopd_lab.viz.strategies import in_order, look_of
from nanopd_lab.viz.style import FAINT, INK, LabFigure, figure

BAND = 0.1
MOST = 0.6  # of the axis of differences; what is beyond is drawn on its edge
FULL = 60  # points that have the full colour
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
    for (row, column), value in np.ndenumerate(values):
        colour = to_rgba(second.colour if value > 0 else first.colour, min(1.0, abs(value) / FULL))
        ax.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, facecolor=colour, linewidth=0))
        ax.text(column, row, f"{round(float(value)):+d}", ha="center", va="center", fontsize=10, color=INK)
    ax.set_xlim(-0.5, len(rates) - 0.5)
    ax.set_xticks(range(len(rates)), [f"{rate:.3g}" for rate in rates])
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("request rate (requests/s)")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0, labelsize=10)
    fig.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return fig
