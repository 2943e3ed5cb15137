"""Policies × rates × seeds, one result a point, in a file that a later run goes on with; intervals over the seeds.

The file has one result of `bench.report` a line. A point whose result is there, whole, is not measured again; a line
that an outage cut short is dropped. All points have the same workers and the same settings, or the file is refused:
figures of unequal clusters are not comparable.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanopd_lab.bench.report import SCHEMA

Result = dict[str, Any]
SUMMARY_SCHEMA = "nanopd-lab/sweep/1"  # of what `nanopd-lab sweep --summary-filename` writes
RESAMPLES = 10_000
CONFIDENCE = 0.95
HEAD = f'{{"schema": "{SCHEMA}"'  # of every line


class Point(NamedTuple):
    """What is measured once; `rate` in requests a second."""

    policy: str
    rate: float
    seed: int


Measure = Callable[[Point], Result]


class Results:
    """Results by point, in memory and, if there is a path, in a file of JSON lines.

    Args:
        settings: what all points share; written into each result as `pd.sweep`

    Raises:
        ValueError: the file is of other settings, or a line is none of ours.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.by_point: dict[Point, Result] = {}
        if path is not None and path.exists():
            self._read(path)

    def add(self, point: Point, result: Result) -> None:
        """Keep a result, at once and for good. A partial one is written, and measured again another time."""
        result["pd"]["sweep"] = self.settings
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if not result["partial"]:
            self.by_point[point] = result

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rest = text[len(whole) :]
        for line, content in enumerate(whole.splitlines(), 1):
            try:
                result = json.loads(content)
                point, settings = point_of(result), result["pd"]["sweep"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path.name}, line {line}: no result of a sweep: {error}") from None
            if settings != self.settings:
                names = [
                    key for key in {*settings, *self.settings} if settings.get(key) != self.settings.get(key)
                ]
                changes = (
                    f"{key} {settings.get(key)!r}, now {self.settings.get(key)!r}" for key in sorted(names)
                )
                raise ValueError(
                    f"{path.name}, line {line} is of other settings: {'; '.join(changes)}; give another file"
                )
            if not result["partial"]:
                self.by_point[point] = result
        if rest:  # the last line was being written when the run ended
            if not rest.startswith(HEAD) and not HEAD.startswith(rest):
                raise ValueError(
                    f"{path.name} is no file of a sweep, and is left as it is; give another file"
                )
            os.truncate(path, len(whole.encode()))


def point_of(result: Mapping[str, Any]) -> Point:
    """Which point a result is of."""
    return Point(result["pd"]["policy"], float(result["request_rate"]), int(result["pd"]["seed"]))


def points_of(policies: Iterable[str], rates: Iterable[float], seeds: Iterable[int]) -> list[Point]:
    """All of them; policies vary slowest, as each may have to start a cluster."""
    rates, seeds = list(rates), list(seeds)
    return [Point(policy, rate, seed) for policy in policies for rate in rates for seed in seeds]


def sweep(points: Iterable[Point], measure: Measure, results: Results) -> Iterator[Result]:
    """The result of each point, measured unless it is there; ends after a partial one."""
    for point in points:
        if point not in results.by_point:
            result = measure(point)
            results.add(point, result)
            if result["partial"]:
                yield result
                return
        yield results.by_point[point]


class Interval(NamedTuple):
    """A mean over seeds, and between what it lies with 95 % confidence; the ends are None for one seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" ({self.low:.4g}–{self.high:.4g})"
        return f"{self.mean:.4g}{ends}"


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean with a percentile bootstrap over `values`, one a seed (Efron and Tibshirani, 1993, chapter 13).

    With as few as three values it is narrower than it should be.
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2:
        return Interval(float(data.mean()) if len(data) else math.nan, None, None, len(data))
    rng = np.random.default_rng(seed)
    means = data[rng.integers(len(data), size=(RESAMPLES, len(data)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(data.mean()), float(low), float(high), len(data))


@dataclass(frozen=True)
class Row:
    """One policy at one rate, over all seeds: intervals by metric."""

    policy: str
    rate: float
    metrics: Mapping[str, Interval]

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        metrics = {name: each._asdict() for name, each in self.metrics.items()}
        rate = self.rate if self.rate < math.inf else "inf"
        return {"policy": self.policy, "request_rate": rate, "metrics": metrics}


def rows_of(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Intervals of every figure that results have, by policy (in the order in which they first come) and rate."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = defaultdict(list)
    for result in results:
        point = point_of(result)
        groups[point.policy, point.rate].append(result)
    rows = []
    for (policy, rate), group in groups.items():
        values: dict[str, list[float]] = defaultdict(list)
        for result in group:
            for name, value in _figures(result):
                values[name].append(value)
        metrics = {name: interval(each) for name, each in values.items() if len(each) == len(group)}
        rows.append(Row(policy, rate, metrics))
    order = list(dict.fromkeys(row.policy for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.policy), row.rate))


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of what differs from seed to seed."""
    for name, value in result.items():
        measured = name.endswith(("_ms", "_throughput", "_goodput", "_per_s")) or name == "duration"
        if measured and value is not None:
            yield name, float(value)
    for name, value in result["pd"]["from_schedule"].items():
        if value is not None:
            yield f"from_schedule_{name}", float(value)
    for name, value in result["pd"]["per_gpu"].items():
        yield f"{name}_per_gpu", float(value)
    yield "mean_concurrency", float(result["pd"]["mean_concurrency"])
    yield "disaggregated", float(result["pd"]["disaggregated"])
    if (attainment := result["pd"].get("slo", {}).get("attainment")) is not None:
        yield "attainment", float(attainment)


COLUMNS = {
    "in time": "attainment",
    "goodput/worker": "request_goodput_per_gpu",
    "tok/s/worker": "output_throughput_per_gpu",
    "TTFT ms": "from_schedule_median_ttft_ms",
    "p99": "from_schedule_p99_ttft_ms",
    "TPOT ms": "mean_tpot_ms",
}


def table(rows: Sequence[Row]) -> str:
    """For people: means over seeds, with 95 % intervals."""
    columns = {title: name for title, name in COLUMNS.items() if any(name in row.metrics for row in rows)}
    lines = [f"{'policy':14}{'req/s':>8}" + "".join(f"{title:>26}" for title in columns)]
    for row in rows:
        cells = (str(row.metrics[name]) if name in row.metrics else "–" for name in columns.values())
        lines.append(f"{row.policy:14}{row.rate:>8.4g}" + "".join(f"{cell:>26}" for cell in cells))
    few = min((each.seeds for row in rows for each in row.metrics.values()), default=0)
    return "\n".join([*lines, f"mean (95 % interval, bootstrap over {few} seeds); TTFT from the schedule"])
