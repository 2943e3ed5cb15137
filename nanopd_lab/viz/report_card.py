"""A report card as one picture: how many times as good as the package's own, and where its peers are."""

from __future__ import annotations

import math

from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from nanopd_lab.lab.report_card import LEVEL, ReportCard
from nanopd_lab.viz.style import ALERT, FAINT, INK, KV, STRATEGIES, WAITING, LabFigure, figure

TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 5, 10, 20)
FURTHEST = 30.0  # times as good or as bad; what is beyond is drawn there


def card_view(card: ReportCard, title: str = "") -> LabFigure:
    """A row a line; the middle is the package's own, to the right is better. Where you are level the row is green.

    Raises:
        ValueError: an empty card.
    """
    if not card.lines:
        raise ValueError("the report card is empty; add a line first")
    fig = figure(9.6, 1.3 + 0.42 * len(card.lines))
    ax = fig.add_subplot()
    ax.axvspan(1 - LEVEL, 1 + LEVEL, color=WAITING, alpha=0.5, linewidth=0)
    ax.axvline(1, color=FAINT, linewidth=1)
    for row, line in enumerate(card.lines):
        ratio = _inside(line.times_as_good(line.yours))
        colour = KV if ratio > 1 - LEVEL else ALERT
        ax.plot([1, ratio], [row, row], color=colour, linewidth=4, solid_capstyle="butt", zorder=2)
        ax.plot(ratio, row, "o", color=STRATEGIES["yours"], markersize=9, zorder=4)
        if line.peer:
            place = _inside(line.times_as_good(line.peer[1]))
            ax.plot(
                place,
                row,
                "D",
                color="white",
                markeredgecolor=FAINT,
                markeredgewidth=1.6,
                markersize=7,
                zorder=3,
            )
            ax.annotate(
                line.peer[0], (place, row), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8.5,
                color=FAINT,
            )  # fmt: skip
    ax.set_xscale("log")
    ends = [
        abs(math.log(_inside(line.times_as_good(value))))
        for line in card.lines
        for value in (line.yours, *([line.peer[1]] if line.peer else []))
    ]
    reach = math.exp(max(math.log(1.5), 1.15 * max(ends)))
    ax.set_xlim(1 / reach, reach)
    ax.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if 1 / reach <= tick <= reach]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(card.lines)), [line.what for line in card.lines])
    ax.set_ylim(len(card.lines) - 0.5, -0.7)
    ax.set_xlabel("times as good as the package's own  (●: yours, ◇: somebody else's)")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    if title:
        ax.set_title(title, loc="left", fontsize=11, color=INK)
    return fig


def _inside(ratio: float) -> float:
    return min(max(ratio, 1 / FURTHEST), FURTHEST)
