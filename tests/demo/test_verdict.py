"""Sentences say what the requests say, and no more than they support."""

from __future__ import annotations

import numpy as np
import pytest

from nanopd_lab.bench.bootstrap import Bounds
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.bench.steps_pace import Pace
from nanopd_lab.demo.predict import PaysMap
from nanopd_lab.demo.report import where
from nanopd_lab.demo.verdict import Comparison, compare, headline, reasons, row_of, sentence, unsteady
from nanopd_lab.router import Slo
from tests.viz.test_serving import simulated

SLO = Slo(0.3, 0.03)


def tables(rate: float) -> dict[str, RequestTable]:
    return {name: RequestTable.of(simulated(name, rate)) for name in ("collocated", "1p1d")}


def test_the_gain_is_the_difference_of_the_shares() -> None:
    found = tables(3.0)
    comparison = compare(found["1p1d"], found["collocated"], SLO)
    assert comparison is not None
    shares = [found[name].attainment(SLO) for name in ("1p1d", "collocated")]
    assert comparison.gain.value == pytest.approx(shares[0] - shares[1])
    assert comparison.gain.low <= comparison.gain.value <= comparison.gain.high


def test_a_run_differs_from_itself_by_nothing() -> None:
    table = tables(3.0)["1p1d"]
    comparison = compare(table, table, SLO)
    assert comparison is not None
    assert comparison.gain == Bounds(0.0, 0.0, 0.0)
    assert not comparison.decided


def test_what_an_interrupt_left_unfinished_is_not_compared() -> None:
    found = tables(3.0)
    found["1p1d"].judged[:] = False
    assert compare(found["1p1d"], found["collocated"], SLO) is None
    found = tables(3.0)
    found["1p1d"].judged[20:] = False
    comparison = compare(found["1p1d"], found["collocated"], SLO)
    assert comparison is not None
    met = [found[name].met(SLO)[:20].mean() for name in ("1p1d", "collocated")]
    assert comparison.gain.value == pytest.approx(met[0] - met[1])


@pytest.mark.parametrize(
    ("gain", "word", "line"),
    [
        (Bounds(0.2, 0.1, 0.3), "disaggregated 1P1D beats collocated", "Disaggregation pays here"),
        (Bounds(-0.2, -0.3, -0.1), "collocated beats disaggregated 1P1D", "Disaggregation does not pay here"),
        (Bounds(0.0, 0.0, 0.0), "had the same requests in time", "No difference here"),
        (Bounds(0.02, -0.1, 0.1), "cannot be told apart", "Too close to call"),
    ],
)
def test_no_more_than_the_interval_supports(gain: Bounds, word: str, line: str) -> None:
    comparison = Comparison("1p1d", "collocated", gain)
    assert word in sentence(comparison)
    if gain.high > 0:
        assert f"{100 * gain.low:+.0f} to {100 * gain.high:+.0f}" in sentence(comparison)
    if gain.high < 0:  # the winner's gain, not the loser's loss
        assert "+20 points of requests in time (measured; 95 % interval +10 to +30)" in sentence(comparison)
    assert headline([comparison]).startswith(line)


def test_a_machine_that_changed_its_speed_is_told() -> None:
    text = unsteady({"collocated": Pace(1.0, 0.9), "1p1d": Pace(1.1, 1.6), "adaptive": Pace(1.15, 1.0)})
    assert text is not None
    assert (
        "compute took 0.90 times as long as modelled with collocated, and 1.60 times with disaggregated"
        in text
    )
    assert "that read" in str(unsteady({"collocated": Pace(2.0, 1.0), "1p1d": Pace(1.0, 1.0)}))
    # Slower than modelled, but all alike: the comparison holds.
    assert unsteady({"collocated": Pace(2.0, 1.5), "1p1d": Pace(2.1, 1.6)}) is None
    assert unsteady({"collocated": Pace(2.0, 1.5)}) is None
    assert unsteady({}) is None


def test_without_both_sides_there_is_no_answer() -> None:
    assert "Nothing was measured of both" in headline([])
    assert reasons({"collocated": tables(3.0)["collocated"]}, SLO) == []


def test_reasons_count_who_missed_what() -> None:
    found = tables(5.0)
    text = "\n".join(reasons(found, SLO))
    table = found["1p1d"]
    late = table.completed & ~table.met(SLO)
    by_ttft = int((late & (table.ttft > SLO.ttft_s) & (table.tpot <= SLO.tpot_s)).sum())
    assert f"disaggregated 1P1D: {by_ttft} by TTFT only" in text
    waits = 1e3 * np.mean(table.stages["queue"] + table.stages["prefill_queue"])
    assert f"{waits:,.0f} ms on average" in text


def test_rows_are_the_results() -> None:
    result = simulated("1p1d", 5.0)
    row = row_of(RequestTable.of(result), SLO, partial=False)
    assert row.attainment is not None
    assert row.goodput is not None
    assert row.tpot_p90 is not None
    assert row.attainment.value == pytest.approx(result["pd"]["slo"]["attainment"])
    assert row.goodput.value == pytest.approx(result["pd"]["per_gpu"]["request_goodput"])
    assert row.tpot_p90.value == pytest.approx(result["p90_tpot_ms"])
    assert row.output_throughput == pytest.approx(result["output_throughput"])


def test_the_map_in_words() -> None:
    pays = PaysMap("1p1d", (1.0, 2.0, 3.0), ("as served", "longer"), ((0.0, 0.1, 0.2), (-0.3, 0.0, 0.04)))
    pay, cost = where(pays)
    assert "as served at 2–3 requests/s" in pay
    assert "longer at 1 requests/s" in cost
    assert "nowhere" in where(PaysMap("1p1d", (1.0,), ("as served",), ((0.0,),)))[0]
