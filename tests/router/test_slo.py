"""Objectives: vLLM's flags, its rule for one token, and drops that count as misses."""

from __future__ import annotations

import math

import pytest

from nanopd_lab.router import Slo
from nanopd_lab.sim.results import RequestRecord, SimResult


def test_parse_is_vllms_flag_in_ms() -> None:
    assert Slo.parse(["ttft:500", "tpot:62.5"]) == Slo(0.5, 0.0625, math.inf)
    assert Slo.parse(["e2el:5000"]).e2e_s == 5.0
    assert str(Slo.parse(["tpot:62.5", "ttft:500"])) == "ttft:500 tpot:62.5"
    assert Slo.parse([]) == Slo()
    assert Slo.parse("ttft:500 tpot:62.5") == Slo(0.5, 0.0625, math.inf)
    assert not Slo().given
    assert Slo(1.0).given


@pytest.mark.parametrize(
    ("items", "names"),
    [
        (["ttft"], "ttft:500"),
        (["ttft:abc"], "'abc'"),
        (["ttft:-1"], "'-1'"),
        (["ttft:nan"], "'nan'"),
        (["tpot:inf"], "'inf'"),
        (["itl:5"], "e2el:5000"),
        (["ttft:1", "ttft:2"], "twice"),
    ],
)
def test_what_cannot_be_parsed_is_named(items: list[str], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        Slo.parse(items)


def test_goodput_counts_those_that_meet_all() -> None:
    def record(first: float, last: float, tokens: int = 11, reason: str = "length") -> RequestRecord:
        return RequestRecord("r", 0.0, 8, tokens, 0.0, first, last, reason)

    slo = Slo(0.5, 0.1)
    good, late, slow = record(0.5, 1.5), record(0.6, 1.0), record(0.5, 1.6)
    dropped = RequestRecord("r", 0.0, 8, 0, error="no room")
    cut = record(0.1, 0.2, reason="error")
    single = record(0.5, 2.0, tokens=1)  # one token has no time per token
    records = [good, late, slow, dropped, cut, single]
    assert [each.meets(slo) for each in records] == [True, False, False, False, False, True]
    result = SimResult(records, [], 0, 0)
    assert result.attainment(slo) == pytest.approx(2 / 6)
    assert result.goodput(slo) == pytest.approx(2 / 2.0)
    assert result.goodput(Slo(e2e_s=1.0)) == pytest.approx(0.5)
    assert math.isnan(SimResult([], [], 0, 0).attainment(slo))
