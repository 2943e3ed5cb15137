"""Figures of serving runs show the figures of the results, and sliders judge the same requests anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from nanopd_lab.bench.report import Setting, serving_result
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.bench.workload import Uniform, random_workload
from nanopd_lab.router import Slo, create_policy
from nanopd_lab.sim import LinearTime, LinkModel, SimConfig, Simulator
from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.viz.serving import (
    STAGE_LOOKS,
    attainment_by_scale,
    goodput_bars,
    itl_distribution,
    latency_breakdown,
    scaled,
    words,
)
from nanopd_lab.viz.serving_explorer import VIEWS, slo_explorer
from nanopd_lab.viz.serving_model import differences, pays_map, simulated_vs_measured
from nanopd_lab.viz.serving_rates import attainment_by_rate, pareto, percentile_by_rate
from nanopd_lab.viz.serving_requests import request_timeline, slo_plane, winners
from nanopd_lab.viz.strategies import in_order, look_of
from nanopd_lab.viz.style import png
from tests.bench.test_metrics import loaded
from tests.bench.test_request_table import result_of

SLO = Slo(0.3, 0.03)
POLICIES = ("collocated", "1p1d", "least-loaded")


def simulated(policy: str, rate: float, seed: int = 0) -> dict[str, Any]:
    workload = random_workload(60, Arrivals(rate), (Uniform(50, 300), Uniform(1, 40)), seed)
    link = LinkModel(0.001, 0.0, 1e8)
    time = LinearTime(0.01, 0.001, 0.0, 0.0005)
    config = SimConfig(num_blocks=500, max_num_batched_tokens=128, block_bytes=10_000, link=link)
    run = Simulator(*create_policy(policy, 2), time, workload.requests, config).run()
    setting = Setting("random:tiny", 2, policy, modelled=True)
    found = serving_result(run.records, workload, setting, SLO, detailed=True)
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return [simulated(policy, rate) for policy in POLICIES for rate in (2.0, 5.0)]


@pytest.fixture(scope="module")
def tables(results: list[dict[str, Any]]) -> list[RequestTable]:
    return [RequestTable.of(result) for result in results]


@pytest.fixture(scope="module")
def busy(tables: list[RequestTable]) -> list[RequestTable]:
    return [table for table in tables if table.rate == 5.0]


def texts(fig: Figure) -> str:
    found = [text.get_text() for ax in fig.axes for text in ax.texts]
    found += [ax.get_title(loc="left") for ax in fig.axes]
    return "\n".join([*found, fig.get_suptitle()])


def test_bars_are_as_long_as_the_goodput(busy: list[RequestTable], results: list[dict[str, Any]]) -> None:
    left, right = goodput_bars(busy, SLO).axes
    wanted = [result for result in results if result["request_rate"] == 5.0]
    assert [bar.get_width() for bar in left.patches] == pytest.approx(
        [result["pd"]["per_gpu"]["request_goodput"] for result in wanted]
    )
    assert [bar.get_width() for bar in right.patches] == pytest.approx(
        [result["pd"]["slo"]["attainment"] for result in wanted]
    )
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "collocated", "disaggregated 1P1D", "least-loaded",
    ]  # fmt: skip
    assert left.get_xlabel().endswith("(requests/s)")


def test_the_breakdown_adds_up_to_the_end_to_end_latency(busy: list[RequestTable]) -> None:
    (ax,) = latency_breakdown(busy).axes
    for row, table in enumerate(busy):
        bars = [bar for bar in ax.patches if round(bar.get_y() + 0.33) == row]
        assert len(bars) == len(STAGE_LOOKS)
        assert sum(bar.get_width() for bar in bars) == pytest.approx(1e3 * np.nanmean(table.e2e), rel=1e-6)


def test_attainment_grows_with_the_scale_and_is_the_runs_at_one(busy: list[RequestTable]) -> None:
    (ax,) = attainment_by_scale(busy, SLO).axes
    for line, table in zip(ax.lines, busy, strict=False):
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert (np.diff(y) >= 0).all()
        assert np.interp(1.0, x, y) == pytest.approx(table.attainment(SLO))


@pytest.mark.parametrize(
    "draw",
    [
        lambda tables: percentile_by_rate(tables, "ttft", slo=SLO),
        lambda tables: percentile_by_rate(tables, "tpot", (50, 90, 99)),
        lambda tables: attainment_by_rate(tables, SLO),
        pareto,
        lambda tables: request_timeline(tables, SLO),
        lambda tables: slo_plane(tables, SLO),
        lambda tables: winners(tables, SLO, 12),
    ],
)
def test_figures_are_drawn_say_modelled_and_name_their_units(
    draw: Callable[..., Figure], tables: list[RequestTable]
) -> None:
    fig = draw(tables)
    assert len(png(fig)) > 5_000
    labels = [
        text for ax in fig.axes for text in (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left"))
    ]
    assert any(text.endswith(("(s)", "(ms)", "(requests/s)")) or "tokens/s" in text for text in labels)
    assert "modelled" in texts(fig) or draw.__code__.co_names[:1] == ("request_timeline",)


def test_percentiles_are_the_results(results: list[dict[str, Any]], tables: list[RequestTable]) -> None:
    _, ax = percentile_by_rate(tables, "ttft", (50, 90)).axes
    line = next(line for line in ax.lines if line.get_color() == look_of("1p1d").colour)
    wanted = [r["pd"]["from_schedule"]["p90_ttft_ms"] for r in results if r["pd"]["policy"] == "1p1d"]
    assert list(line.get_ydata()) == pytest.approx(wanted)


def test_measured_gaps_are_drawn_as_a_tail() -> None:
    table = RequestTable.of(result_of(loaded(2), SLO))
    (ax,) = itl_distribution([table], SLO.tpot_s).axes
    x, y = ax.lines[0].get_xdata(), ax.lines[0].get_ydata()
    assert (np.diff(y) <= 0).all()
    assert (np.diff(x) >= 0).all()
    middle = np.interp(0.5, y[::-1], x[::-1])
    assert middle == pytest.approx(1e3 * np.median(table.gaps), rel=0.05)


def test_a_simulation_has_no_gaps_to_draw(busy: list[RequestTable]) -> None:
    with pytest.raises(ValueError, match="only measured ones"):
        itl_distribution(busy)


def test_the_timeline_marks_those_that_missed(busy: list[RequestTable]) -> None:
    fig = request_timeline(busy[:1], SLO, most=20)
    (ax,) = fig.axes
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    missed = int((~busy[0].met(SLO))[:20].sum())
    assert len(crosses) == missed
    assert f"{missed} of the first 20" in texts(fig)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(40, 3000), st.integers(5, 300))
def test_sliders_goodput_is_the_benchmarks(seed: int, ttft_ms: int, tpot_ms: int) -> None:
    records = loaded(seed)
    assert any(record.ok for record in records)
    explorer = slo_explorer([RequestTable.of(result_of(records, SLO))])
    for name, value in (("ttft_ms", ttft_ms + 0.123), ("tpot_ms", tpot_ms + 0.123)):
        explorer.controls[name].value = value
    assert explorer.error.value == ""
    now = Slo(explorer.controls["ttft_ms"].value / 1e3, explorer.controls["tpot_ms"].value / 1e3)
    wanted = result_of(records, now)["pd"]["per_gpu"]["request_goodput"]
    left, _ = explorer._view(*(explorer.controls[n].value for n in ("ttft_ms", "tpot_ms", "shows"))).axes
    assert left.patches[0].get_width() == pytest.approx(wanted, abs=1e-12)


def test_every_view_follows_the_sliders(busy: list[RequestTable]) -> None:
    explorer = slo_explorer(busy)
    seen = {explorer.image.value}
    for name in VIEWS:
        explorer.controls["shows"].value = name
        explorer.controls["ttft_ms"].value *= 1.5
        assert explorer.error.value == ""
        seen.add(explorer.image.value)
    assert len(seen) >= len(VIEWS)


def test_the_band_counts_what_is_inside(results: list[dict[str, Any]]) -> None:
    measured = [r for r in results if r["request_rate"] == 5.0]
    other = [simulated(r["pd"]["policy"], 5.0, seed=1) for r in measured]
    assert all(value == 0 for each in differences(list(zip(measured, measured, strict=True))).values()
               for value in each.values())  # fmt: skip
    found = differences(list(zip(measured, other, strict=True)))
    values = [value for each in found.values() for value in each.values()]
    fig = simulated_vs_measured(list(zip(measured, other, strict=True)))
    assert f"{sum(abs(v) <= 0.1 for v in values)} of {len(values)}" in texts(fig)
    with pytest.raises(ValueError, match="pair the same strategy"):
        differences([(measured[0], measured[1])])


def test_the_map_says_every_number() -> None:
    fig = pays_map([1, 2], ["short", "long"], [[-0.2, 0.1], [0, 0.33]], "modelled", ("collocated", "1p1d"))
    assert {text.get_text() for text in fig.axes[0].texts} == {"-20", "+10", "+0", "+33"}


def test_nobody_draws_nothing() -> None:
    with pytest.raises(ValueError, match="no results"):
        goodput_bars([], SLO)


def test_looks_tell_strategies_apart() -> None:
    names = ["collocated", "2p6d", "adaptive", "round-robin", "least-loaded", "threshold", "nanopd", "oracle"]
    looks = [look_of(name) for name in names]
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == len(names)
    assert look_of("2p6d").colour == look_of("1p1d").colour == look_of("disaggregated").colour
    assert look_of("threshold-512").colour == look_of("threshold").colour
    assert look_of("threshold-512").label == "threshold-512"
    assert in_order(["adaptive", "1p1d", "my-own", "collocated"]) == [
        "collocated",
        "1p1d",
        "adaptive",
        "my-own",
    ]
    assert words(scaled(Slo(0.1, 0.02), 2)) == "TTFT ≤ 200 ms, TPOT ≤ 40 ms"
