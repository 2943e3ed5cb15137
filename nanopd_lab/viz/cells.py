"""One large pool of workers or many small ones: what the size of a pool is worth at equal load."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.ticker import NullFormatter, PercentFormatter, ScalarFormatter

from nanopd_lab.viz.style import ALERT, DECODE, INK, KV, PREFILL, LabFigure, figure

COLOURS = (KV, DECODE, PREFILL, ALERT)


def cells_view(kept: Mapping[float, Mapping[int, float]], title: str = "") -> LabFigure:
    """A line a load: share of requests in time over the number of workers in a pool.

    Args:
        kept: load as a share of the planned capacity, to size of a pool, to share in time (0 to 1); four loads at most

    Raises:
        ValueError: no figures, or more than four loads.
    """
    if not 1 <= len(kept) <= len(COLOURS) or not all(kept.values()):
        raise ValueError(
            f"{len(kept)} loads; give 1 to {len(COLOURS)}, each with the size of a pool at least"
        )
    fig = figure(9.6, 3.7)
    ax = fig.add_subplot()
    for (load, shares), colour, marker in zip(sorted(kept.items()), COLOURS, "osD^", strict=False):
        sizes = sorted(shares)
        ax.plot(
            sizes, [shares[size] for size in sizes], marker=marker, color=colour, linewidth=2, markersize=7,
            label=f"{load:.0%} of the planned rate",
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted({size for shares in kept.values() for size in shares}))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    lowest = min(share for shares in kept.values() for share in shares.values())
    ax.set_ylim(min(0.5, lowest - 0.05), 1.03)
    ax.set_xlabel("GPUs in a pool")
    ax.set_ylabel("requests in time")
    ax.grid(True, alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower right")
    if title:
        ax.set_title(title, loc="left", fontsize=11, color=INK)
    return fig
