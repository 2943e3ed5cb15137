"""Sweeps that were recorded on GPUs: what is there, the newest of each kind, and all of it in one figure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from nanopd_lab.bench.sweep import SUMMARY_SCHEMA, Interval, Row
from nanopd_lab.resources import data_dir
from nanopd_lab.router.slo import Slo
from nanopd_lab.viz.serving import tidy, words
from nanopd_lab.viz.strategies import in_order, look_of
from nanopd_lab.viz.style import INK, LabFigure, figure

_DATE = re.compile(r"-(\d{4}-\d\d-\d\d)(-[^.]*)?$")


@dataclass(frozen=True)
class RecordedSweep:
    """A measured sweep. `name` is its file's up to the date; `rows` are means with intervals over seeds.

    results: file of all its results, a line each; None if only the means were kept
    """

    name: str
    date: str
    workers: int
    device: str
    settings: Mapping[str, Any]
    slo: Slo
    rows: tuple[Row, ...]
    results: Path | None

    @property
    def kind(self) -> str:
        """What the file's name says of the workload: `long` of `sweep-long-qwen3-8b-…`."""
        return self.name.removeprefix("sweep-").partition("-")[0]

    @property
    def top_rate(self) -> float:
        """The highest request rate."""
        return max(row.rate for row in self.rows)

    def at(self, rate: float) -> dict[str, Row]:
        """Rows of one rate, by policy."""
        return {row.policy: row for row in self.rows if row.rate == rate}

    def measured(self) -> list[dict[str, Any]]:
        """Every result; empty if only the means were kept."""
        if self.results is None:
            return []
        return [json.loads(line) for line in self.results.read_text(encoding="utf-8").splitlines()]

    def __str__(self) -> str:
        given = self.settings
        lengths = given["dataset_name"]
        if lengths == "random":
            lengths = f"{given['random_input_len']:,} in, {given['random_output_len']:,} out"
        machine = f"{self.workers} × {self.device.removeprefix('NVIDIA ')}"
        return f"{lengths}, {self.top_rate:g} requests/s, {machine}: within {words(self.slo)}"


def recorded_sweeps(folder: Path | None = None) -> list[RecordedSweep]:
    """The newest whole measured sweep of each name in a folder (of the package's records), that had objectives."""
    newest: dict[str, tuple[str, Path]] = {}
    for path in sorted((folder or data_dir() / "recorded").glob("sweep-*.json")):
        if match := _DATE.search(path.stem):
            name = path.stem[: match.start()]
            newest[name] = max(newest.get(name, ("", path)), (match[1] + (match[2] or ""), path))
    found = (_read(name, date, path) for name, (date, path) in newest.items())
    return sorted((each for each in found if each is not None), key=lambda each: (each.workers, each.name))


def _read(name: str, date: str, path: Path) -> RecordedSweep | None:
    record = json.loads(path.read_text(encoding="utf-8"))
    if (
        record.get("schema") != SUMMARY_SCHEMA
        or record["modelled"]
        or record["partial"]
        or not record["rows"]
    ):
        return None
    goals = record["settings"].get("goodput")
    if not goals:
        return None
    rows = tuple(
        Row(
            each["policy"],
            float(each["request_rate"]),
            {k: Interval(**v) for k, v in each["metrics"].items()},
        )
        for each in record["rows"]
    )
    results = path.with_suffix(".jsonl")
    gpus = record["provenance"]["machine"]["gpus"] or ["CPU"]
    return RecordedSweep(
        name, date, record["workers"], gpus[0], record["settings"], Slo.parse(goals), rows,
        results if results.exists() else None,
    )  # fmt: skip


def sweeps_view(sweeps: Sequence[RecordedSweep]) -> LabFigure:
    """A band a sweep, at its highest rate: share of requests in time, goodput a GPU, and median TTFT and TPOT.

    Whiskers are 95 % intervals over seeds; the best of each band has its figure in bold.

    Raises:
        ValueError: no sweeps.
    """
    if not sweeps:
        raise ValueError(
            "no sweep of GPUs is recorded; nanopd-lab sweep --goodput … --summary-filename writes one"
        )
    bands = [(each, in_order(list(each.at(each.top_rate)))) for each in sweeps]
    fig = figure(9.6, 0.5 + sum(0.75 + 0.27 * len(policies) for _, policies in bands))
    grid = fig.subplots(len(bands), 2, squeeze=False, height_ratios=[2 + len(names) for _, names in bands])
    for (share, good), (each, policies) in zip(grid, bands, strict=True):
        rows = each.at(each.top_rate)
        _bars(share, [rows[name] for name in policies], "attainment", "{:.0%}")
        _bars(good, [rows[name] for name in policies], "request_goodput_per_gpu", "{:.2f}")
        share.set_xlim(0, 1.18)
        share.set_xticks([0, 0.5, 1])
        share.xaxis.set_major_formatter(PercentFormatter(1.0))
        good.set_xlim(0, 1.22 * max(1e-9, good.get_xlim()[1]))
        good.set_yticklabels([])
        share.set_title(str(each), loc="left", fontsize=10, color=INK)
    grid[-1][0].set_xlabel("requests in time")
    grid[-1][1].set_xlabel("goodput per GPU (requests/s)")
    dates = sorted({each.date[:10] for each in sweeps})
    fig.suptitle(
        f"recorded {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        fontsize=11,
        color=INK,
        x=0.01,
        ha="left",
    )
    return fig


def _bars(ax: Axes, rows: Sequence[Row], metric: str, text: str) -> None:
    values = [row.metrics[metric] for row in rows]
    best = max(value.mean for value in values)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        low, high = (value.mean if end is None else end for end in (value.low, value.high))
        ax.barh(place, value.mean, height=0.66, color=look_of(row.policy).colour)
        ax.errorbar(
            value.mean,
            place,
            xerr=[[value.mean - low], [high - value.mean]],
            color=INK,
            capsize=3,
            linewidth=1.1,
        )
        ax.annotate(
            text.format(value.mean), (high, place), textcoords="offset points", xytext=(6, -4), fontsize=9.5,
            color=INK, fontweight="bold" if value.mean == best else "normal",
        )  # fmt: skip
    ax.set_yticks(range(len(rows)), [look_of(row.policy).label for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    tidy(ax, "x")
