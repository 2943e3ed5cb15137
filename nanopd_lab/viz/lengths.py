"""How good forecasts of output lengths are: where lengths fall within them, and what is recorded of a real trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nanopd_lab.router.predictor.evaluation import LEVELS, Replay
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, KV, PREFILL, LabFigure, figure

COLOURS = (INK, ALERT, PREFILL, DECODE, KV)


def reliability(replays: Mapping[str, Replay], skip: int = 0) -> dict[str, list[float]]:
    """Of each predictor the share of outputs that each level's quantile holds; a right one gives the level or more.

    Args:
        skip: requests at the beginning that are not judged
    """
    return {
        name: [float((each.lengths[skip:] <= quantiles).mean()) for quantiles in each.quantiles[skip:].T]
        for name, each in replays.items()
    }


def calibration(
    replays: Mapping[str, Replay], recorded: Mapping[str, Any], skip: int = 0, way: str = "delayed"
) -> LabFigure:
    """Promised against kept shares on what was run here; and the loss of predictors on a recorded trace.

    Args:
        recorded: of `nanopd-lab predict`
        way: how predictors learn there
    """
    fig = figure(9.6, 4.4)
    left, right = fig.subplots(1, 2, width_ratios=(1, 1.1))
    left.plot([0, 100], [0, 100], color=FAINT, linewidth=1.2)
    for (name, shares), colour in zip(reliability(replays, skip).items(), COLOURS, strict=False):
        left.plot(
            100 * np.array(LEVELS), 100 * np.array(shares), "o-", color=colour, label=name, linewidth=1.8,
            markeredgecolor="white",
        )  # fmt: skip
    left.set_xlabel("quantile that is asked for (%)")
    left.set_ylabel("outputs that it holds (%)")
    left.set_title("drawn lengths, cut: measured here", loc="left", fontsize=11, color=INK)
    left.legend(loc="upper left", frameon=False, fontsize=9)
    found = recorded["scenarios"][way]
    names = list(found)[::-1]
    for row, name in enumerate(names):
        mean, low, high = found[name]["pinball"]
        right.barh(row, mean, color=COLOURS[0] if name.startswith("bayesian") else FAINT, height=0.66)
        right.plot([low, high], [row, row], color=ALERT, linewidth=2.5)
        right.text(high, row, f" {mean:.1f}", va="center", fontsize=9.5, color=INK)
    right.set_yticks(range(len(names)), names)
    right.margins(x=0.12)
    right.set_xlabel("pinball loss (tokens; smaller is better; line: 95 %)")
    right.set_title(
        f"{recorded['judged']:,} requests of a trace: recorded", loc="left", fontsize=11, color=INK
    )
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    left.grid(True, alpha=0.25)
    return fig
