"""What the runs say about when disaggregation pays: numbers with intervals, and the sentences that they support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nanopd_lab.bench.bootstrap import Bounds, interval
from nanopd_lab.bench.metrics import Floats
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.bench.steps_pace import Pace
from nanopd_lab.router import Slo
from nanopd_lab.viz.strategies import disaggregates, look_of

STEADY = 1.2  # what steps took by what they take by the model: the largest of a strategy by the smallest may be that


class Row(NamedTuple):
    """A strategy's figures; latencies in ms, from the schedule.

    attainment: share of the judged requests that met all objectives; None: nothing was judged
    """

    policy: str
    requests: int
    completed: int
    attainment: Bounds | None
    goodput: Bounds | None
    ttft_p50: Bounds | None
    ttft_p90: Bounds | None
    tpot_p50: Bounds | None
    tpot_p90: Bounds | None
    output_throughput: float
    partial: bool


class Comparison(NamedTuple):
    """How much larger `better`'s share of requests in time is than `than`'s, request by request."""

    better: str
    than: str
    gain: Bounds

    @property
    def decided(self) -> bool:
        """True if the interval has zero outside."""
        return self.gain.low > 0 or self.gain.high < 0


def row_of(table: RequestTable, slo: Slo, partial: bool) -> Row:
    """The figures of one run."""
    met = table.met(slo)[table.judged].astype(np.float64)
    share = interval(met) if len(met) else None
    each = table.goodput(slo) / table.workers
    factor = each / share.value if share and share.value else 0.0
    good = Bounds(each, factor * share.low, factor * share.high) if share else None
    done = table.completed
    tpot = table.tpot[done & (table.output_tokens > 1)]
    tokens = float(table.output_tokens[done].sum())
    return Row(
        table.policy, len(table), int(done.sum()), share, good,
        _percentile(table.ttft[done], 50), _percentile(table.ttft[done], 90),
        _percentile(tpot, 50), _percentile(tpot, 90),
        tokens / table.duration if table.duration else 0.0, partial,
    )  # fmt: skip


def compare(better: RequestTable, than: RequestTable, slo: Slo) -> Comparison | None:
    """Two runs of the same requests; None where an interrupt left none that both have ended."""
    both = min(len(better), len(than))
    judged = better.judged[:both] & than.judged[:both]
    if not judged.any():
        return None
    gain = better.met(slo)[:both].astype(np.float64) - than.met(slo)[:both]
    return Comparison(better.policy, than.policy, interval(gain[judged]))


def sentence(found: Comparison, source: str = "measured") -> str:
    """What a comparison says, in words."""
    better, than = look_of(found.better).label, look_of(found.than).label
    value, low, high = (100 * each for each in found.gain)
    numbers = f"{value:+.0f} points of requests in time ({source}; 95 % interval {low:+.0f} to {high:+.0f})"
    if found.gain == Bounds(0.0, 0.0, 0.0):
        return f"{better} and {than} had the same requests in time ({source}); tighter promises or more load may tell."
    if not found.decided:
        return f"{better} and {than} cannot be told apart here: {numbers}."
    if value > 0:
        return f"{better} beats {than} here: {numbers}."
    numbers = (
        f"{-value:+.0f} points of requests in time ({source}; 95 % interval {-high:+.0f} to {-low:+.0f})"
    )
    return f"{than} beats {better} here: {numbers}."


def headline(comparisons: Sequence[Comparison]) -> str:
    """The answer in one line."""
    split = next((c for c in comparisons if disaggregates(c.better) and c.than == "collocated"), None)
    if split is None:
        return "Nothing was measured of both collocated and disaggregated serving."
    if split.gain == Bounds(0.0, 0.0, 0.0):
        return "No difference here: collocated and disaggregated have the same requests in time."
    points = f"{100 * split.gain.value:+.0f} points of requests in time"
    if not split.decided:
        return f"Too close to call: with these requests and promises, disaggregation changes {points}."
    return f"Disaggregation {'pays' if split.gain.value > 0 else 'does not pay'} here: {points}."


def unsteady(paces: Mapping[str, Pace]) -> str | None:
    """A warning where strategies met a machine of unlike speeds; None: no need for one."""
    for work, name in (("read", "reading"), ("compute", "computing")):
        ratios = sorted((getattr(pace, name), look_of(policy).label) for policy, pace in paces.items())
        if ratios and ratios[-1][0] > STEADY * ratios[0][0]:
            (low, fast), (high, slow) = ratios[0], ratios[-1]
            return (
                f"Steps that {work} took {low:.2f} times as long as modelled with {fast}, and {high:.2f} times with "
                f"{slow}. Either the machine's speed changed between the two (was it busy with other things?), or the "
                "model misses something: run it again while nothing else runs, before you believe the comparison."
            )
    return None


def reasons(tables: Mapping[str, RequestTable], slo: Slo) -> list[str]:
    """What disaggregation gains and costs in these runs, from the requests; empty if one side is missing."""
    split = next((table for name, table in tables.items() if disaggregates(name)), None)
    both = tables.get("collocated")
    if split is None or both is None or not split.completed.any() or not both.completed.any():
        return []
    found = []
    if len(both.gaps) and len(split.gaps):
        gaps = [1e3 * np.quantile(table.gaps, (0.5, 0.99)) for table in (both, split)]
        found.append(
            "Gaps between tokens. Collocated, a prompt of somebody else is computed between two tokens: the median "
            f"gap is {gaps[0][0]:,.0f} ms and one in a hundred is longer than {gaps[0][1]:,.0f} ms. Disaggregated: "
            f"{gaps[1][0]:,.0f} and {gaps[1][1]:,.0f} ms."
        )
    queues = [_mean(table, "queue", "prefill_queue") for table in (both, split)]
    longer = "so prompts wait longer" if queues[1] > queues[0] else "yet prompts did not wait longer here"
    found.append(
        f"Waiting for prefill. Fewer workers prefill when some only decode, {longer}: "
        f"{queues[1]:,.0f} ms on average, {queues[0]:,.0f} ms collocated."
    )
    moved = _mean(split, "transfer_visible")
    found.append(
        f"Moving the KV cache. A request waits {moved:,.0f} ms for its KV, and for the step of its decode worker that "
        f"takes it in, after a prefill of {_mean(split, 'prefill'):,.0f} ms."
    )
    misses = []
    for name, table in (("collocated", both), (look_of(split.policy).label, split)):
        late = table.completed & ~table.met(slo)
        ttft, tpot = (table.ttft > slo.ttft_s) & late, (table.tpot > slo.tpot_s) & late
        misses.append(
            f"{name}: {int((ttft & ~tpot).sum())} by TTFT only, {int((tpot & ~ttft).sum())} by TPOT only, "
            f"{int((ttft & tpot).sum())} by both"
        )
    found.append("Who missed, and what. " + "; ".join(misses) + ".")
    return found


def _mean(table: RequestTable, *stages: str) -> float:
    values = sum((table.stages[stage] for stage in stages), np.zeros(len(table)))[table.completed]
    values = values[~np.isnan(values)]
    return 1e3 * float(values.mean()) if len(values) else 0.0


def _percentile(values: Floats, percent: float) -> Bounds | None:
    if not len(values):
        return None
    return interval(1e3 * values, lambda rows: np.percentile(rows, percent, axis=-1))
