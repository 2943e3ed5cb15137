"""What the fleet's picture shows is what the record says."""

from __future__ import annotations

import copy

import pytest

from nanopd_lab.bench.fleet.record import controllers, load
from nanopd_lab.viz.fleet_view import fleet_view


def test_lines_are_the_records_figures() -> None:
    record = load()
    left, middle, right = fleet_view(record).axes
    for number in (1, 2, 4, 16):
        rows = [
            row
            for row in record["parts"]["saturation-1000"]["rows"]
            if (row["settings"]["policy"], row["settings"]["shards"]) == ("adaptive", number)
        ]
        label = f"{number} controller" + "s" * (number > 1)
        (line,) = [line for line in left.lines if line.get_label() == label]
        assert list(line.get_xdata()) == [row["settings"]["rate"] for row in rows]
        assert list(line.get_ydata()) == [row["in_time"] for row in rows]
    for policy in ("adaptive", "least-loaded"):
        (line,) = [line for line in middle.lines if line.get_label() == f"{policy}: decisions"]
        measured = [point.decisions_per_s for point in controllers(record) if point.policy == policy]
        assert list(line.get_ydata()) == pytest.approx(measured)
    (line,) = [line for line in right.lines if line.get_label() == "two-choices, by news"]
    rows = [
        row for row in record["parts"]["news"]["rows"] if row["settings"]["door"]["name"] == "two-choices"
    ]
    assert list(line.get_ydata()) == pytest.approx([1e3 * row["p99_ttft_s"] for row in rows])


def test_a_controllers_limit_lies_where_its_time_is_full() -> None:
    """The dotted lines are the rate at which decisions and messages take all of a controller's time."""
    record = load()
    left = fleet_view(record).axes[0]
    dotted = [line.get_xdata()[0] for line in left.lines if line.get_linestyle() == ":"]
    assert dotted == sorted(dotted)
    rows = [
        row for row in record["parts"]["saturation-1000"]["rows"] if row["settings"]["policy"] == "adaptive"
    ]
    for limit, shards in zip(dotted, (1, 2, 4), strict=False):
        for row in rows:
            if row["settings"]["shards"] == shards and row["settings"]["rate"] > 2 * limit:
                assert row["in_time"] < 0.5
            if row["settings"]["shards"] == shards and row["settings"]["rate"] < 0.7 * limit:
                assert row["in_time"] > 0.95


def test_a_record_without_a_part_is_refused() -> None:
    record = copy.deepcopy(load())
    del record["parts"]["news"]
    with pytest.raises(ValueError, match=r"no part .news.*--study news"):
        fleet_view(record)
