"""A fleet's limits in one picture: where its controllers saturate, why, and what old news do at the front door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from nanopd_lab.bench.fleet.record import controllers
from nanopd_lab.viz.serving import tidy
from nanopd_lab.viz.style import ALERT, FAINT, INK, REQUESTS, LabFigure, figure, strategy_colour

SHADES = (
    "#B7E3D3",
    "#66C2A0",
    "#1B9E77",
    "#0B5D45",
    "#06352A",
)  # of adaptive's green, by the number of controllers
PER_GPU = 6.0  # requests a second, in the middle panel
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value:,.0f}")


def fleet_view(
    record: Mapping[str, Any], part: str = "saturation-1000", policy: str = "adaptive"
) -> LabFigure:
    """Share in time by request rate and number of controllers; decisions a second by workers; and by the news' age the
    slowest first tokens.

    Args:
        record: of `nanopd-lab simulate-fleet` (`bench.fleet.record.load`)
        part: the study's part for the left panel; the right one is "news"
        policy: for the left panel

    Raises:
        ValueError: the record lacks a part.
    """
    for name in (part, "news"):
        if name not in record["parts"]:
            raise ValueError(
                f"the record has no part {name!r}, only {', '.join(record['parts'])}; make it by "
                f"nanopd-lab simulate-fleet --study {name} --result-filename …"
            )
    fig = figure(13.2, 4.2)
    left, middle, right = fig.subplots(1, 3)
    _saturation(left, record["parts"][part]["rows"], policy)
    _controllers(middle, record)
    _news(right, record["parts"]["news"]["rows"])
    date = record["provenance"][part]["date"][:10]
    fig.suptitle(
        f"recorded {date}: controllers measured on one core; fleets of H100s simulated with these times",
        fontsize=11, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    return fig


def _saturation(ax: Axes, rows: Sequence[Mapping[str, Any]], policy: str) -> None:
    mine = [row for row in rows if row["settings"]["policy"] == policy]
    shards = sorted({row["settings"]["shards"] for row in mine})
    shades = SHADES[-len(shards) :] if policy == "adaptive" else REQUESTS
    for colour, number in zip(shades, shards, strict=False):
        line = [row for row in mine if row["settings"]["shards"] == number]
        rates = [row["settings"]["rate"] for row in line]
        name = f"{number} controller" + "s" * (number > 1)
        ax.plot(
            rates, [row["in_time"] for row in line], "o-", color=colour, label=name, markeredgecolor="white"
        )
        for row in line:
            ends = [min(row["in_time_by_seed"]), max(row["in_time_by_seed"])]
            ax.plot([row["settings"]["rate"]] * 2, ends, color=colour, linewidth=3, alpha=0.5)
        # Where its work would fill a controller's time, from the load at the lowest rate.
        limit = rates[0] / line[0]["controller_load"]
        if limit <= max(rates) * 1.1:
            ax.axvline(limit, color=colour, linewidth=1.2, linestyle=":")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(_PLAIN)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(sorted({row["settings"]["rate"] for row in mine}))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_ylim(-0.03, 1.05)
    ax.set_xlabel("requests/s and GPU (dotted: load 1 by the measured times)")
    ax.set_ylabel("requests in time")
    workers = mine[0]["settings"]["workers"]
    ax.set_title(f"{workers:,} workers, {policy}: modelled", loc="left", fontsize=10.5, color=INK)
    ax.legend(frameon=False, fontsize=8.5, handlelength=1.2, loc="center left", bbox_to_anchor=(0.19, 0.58))
    tidy(ax, "y")


def _controllers(ax: Axes, record: Mapping[str, Any]) -> None:
    points = controllers(dict(record))
    sizes = sorted({point.workers for point in points})
    for policy in sorted({point.policy for point in points}):
        line = [point for point in points if point.policy == policy]
        colour = strategy_colour(policy)
        ax.plot(
            [p.workers for p in line],
            [p.decisions_per_s for p in line],
            "o-",
            color=colour,
            label=f"{policy}: decisions",
        )
        ax.plot(
            [p.workers for p in line], [p.requests_per_s for p in line], "--", color=colour, linewidth=1.3,
            label="… with all messages",
        )  # fmt: skip
        for point in line:
            rounds = [each.decisions / each.decisions_s for each in point.rounds if each.decisions_s]
            ax.plot([point.workers] * 2, [min(rounds), max(rounds)], color=colour, linewidth=3, alpha=0.4)
    ax.plot(
        sizes,
        [PER_GPU * size for size in sizes],
        color=ALERT,
        linewidth=1.5,
        label=f"asked, {PER_GPU:g}/s a GPU",
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(sizes)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(_PLAIN)
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("workers of one controller")
    ax.set_ylabel("a second")
    ax.set_title("one controller: measured", loc="left", fontsize=10.5, color=INK)
    ax.set_ylim(bottom=2)
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    tidy(ax, "y")


def _news(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    def door(row: Mapping[str, Any]) -> str:
        return str(row["settings"]["door"]["name"])

    ages = sorted({row["settings"]["door"]["digest_s"] for row in rows})
    looks = {"two-choices": REQUESTS[2], "least": REQUESTS[4]}
    for name, colour in looks.items():
        line = [row for row in rows if door(row) == name]
        places = [ages.index(row["settings"]["door"]["digest_s"]) for row in line]
        ax.plot(
            places, [1e3 * row["p99_ttft_s"] for row in line], "o-", color=colour, label=f"{name}, by news"
        )
    for name, style in (("random", "--"), ("round-robin", ":")):
        for row in rows:
            if door(row) == name:
                ax.axhline(1e3 * row["p99_ttft_s"], color=FAINT, linestyle=style, label=name)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(_PLAIN)
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(ages)), [f"{1e3 * age:,.0f}" for age in ages])
    ticks = [250, 500, 1000, 2000, 5000, 10_000]
    low, high = ax.get_ylim()
    ax.set_yticks([tick for tick in ticks if low <= tick <= high])
    ax.set_xlabel("age of the news at the front door (ms)")
    ax.set_ylabel("TTFT p99 (ms)")
    settings = rows[0]["settings"]
    title = f"{settings['workers']} workers in {settings['shards']} shards: modelled"
    ax.set_title(title, loc="left", fontsize=10.5, color=INK)
    ax.legend(frameon=False, fontsize=9)
    tidy(ax, "y")
