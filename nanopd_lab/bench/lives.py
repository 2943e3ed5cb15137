"""What the workers had at any moment of a finished run, reckoned from the times and lengths of its requests.

    sent ──queue──► routed ──prefill_queue──► begun ──prefill──► first ──transfer_visible──► arrived ──decode──► gone
       controller        waits there            computes           its KV moves              computes

Stages are of the last attempt. A request that failed is gone after the last moment that is known of it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanopd_lab.bench.frames import End, Frame, WorkerFrame, rolled
from nanopd_lab.bench.metrics import Floats
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.router.slo import Slo

ARROW = "→"  # of `core.Route`


@dataclass(frozen=True, eq=False)
class Lives:
    """Moments of every request in s from the begin of the run (infinite: not reached), and its two workers ("": none).

    gone: when it ended, whatever became of it
    """

    sent: Floats
    routed: Floats
    begun: Floats
    first: Floats
    arrived: Floats
    gone: Floats
    source: NDArray[np.str_]
    target: NDArray[np.str_]

    @classmethod
    def of(cls, table: RequestTable) -> Lives:
        """From a table's stages."""
        moments = [table.scheduled + table.late]
        for stage in ("queue", "prefill_queue", "prefill", "transfer_visible", "decode"):
            moments.append(moments[-1] + np.maximum(table.stages[stage], 0.0))
        known = np.fmax.reduce([table.scheduled, *moments])
        gone = np.where(table.completed, table.scheduled + table.e2e, known)
        routes = [route.partition(ARROW) for route in table.routes]
        sent, routed, begun, first, arrived = (
            np.where(np.isnan(each), np.inf, np.fmin(each, gone)) for each in moments[:-1]
        )
        source = np.array([source for source, _, _ in routes])
        target = np.array([target or source for source, _, target in routes])
        return cls(sent, routed, begun, first, arrived, gone, source, target)


def frames_of(
    table: RequestTable, slo: Slo, window_s: float | None, count: int
) -> tuple[list[Frame], list[End], float]:
    """So many moments, evenly from the begin to the end of the run; the requests that ended; and the window.

    Raises:
        ValueError: nothing was sent.
    """
    lives = Lives.of(table)
    sent = np.isfinite(lives.sent)
    if not sent.any():
        raise ValueError(f"no request of the run of {table.policy} was sent; there is nothing to replay")
    last = float(lives.gone[sent].max())
    window_s = window_s or max(last / 8, 1e-3)
    times = np.linspace(0.0, last, count)
    ends = _ends(table, lives)
    done = np.array([end.time_s for end in ends if end.ok])
    lost = np.array([end.time_s for end in ends if not end.ok])
    workers = [_worker(name, table, lives, times) for name in _names(table)]
    queued = _present(lives.sent, np.fmin(lives.routed, lives.gone), times)
    columns = zip(
        times.tolist(), queued, _before(lives.sent[sent], times), _before(done, times), _before(lost, times),
        rolled(times, ends, slo, window_s), zip(*workers, strict=True), strict=True,
    )  # fmt: skip
    frames, routes, taken = [], Counter[str](), 0
    for time, waiting, begun, completed, failed, rolling, states in columns:
        while taken < len(ends) and ends[taken].time_s <= time:
            routes[ends[taken].route] += 1
            taken += 1
        frames.append(
            Frame(time, int(waiting), int(begun), int(completed), int(failed), dict(routes), rolling, states)
        )
    return frames, ends, window_s


def _ends(table: RequestTable, lives: Lives) -> list[End]:
    found = []
    for row in np.argsort(lives.gone, kind="stable"):
        if not table.judged[row]:
            continue
        ttft, tpot, e2e = (
            None if np.isnan(column[row]) else float(column[row])
            for column in (table.ttft, table.tpot, table.e2e)
        )
        ok = bool(table.completed[row])
        found.append(End(float(lives.gone[row]), ttft, tpot, e2e, ok, table.routes[row]))
    return found


def _names(table: RequestTable) -> list[str]:
    """All workers: those that routes name, or else w0 and so on."""
    named = {name for route in table.routes for name in route.split(ARROW) if name}
    every = named | {f"w{number}" for number in range(table.workers)}
    return sorted(every, key=lambda name: (re.sub(r"\d+", "", name), int(re.sub(r"\D", "", name) or 0)))


def _worker(name: str, table: RequestTable, lives: Lives, times: Floats) -> list[WorkerFrame]:
    """One worker at each time. Its KV: prompts from their first chunk, outputs as they grow."""
    reads, writes = lives.source == name, lives.target == name
    both, ends = reads & writes, lives.gone
    role = "mixed" if both.any() or (reads.any() and writes.any()) else "prefill" if reads.any() else "decode"
    if not reads.any() and not writes.any():
        role = "mixed"
    waiting = _present(lives.routed[reads], np.fmin(lives.begun, ends)[reads], times)
    prefilling = _present(lives.begun[reads], np.fmin(lives.first, ends)[reads], times)
    pulls = writes & ~reads
    awaited = _present(lives.routed[pulls], np.fmin(lives.arrived, ends)[pulls], times)
    decoding = _present(lives.arrived[writes], ends[writes], times)
    held = np.zeros(len(times))
    for rows, begin, end in (
        (both, lives.begun, ends),
        (reads & ~writes, lives.begun, np.fmin(lives.arrived, ends)),
        (pulls, lives.arrived, ends),
    ):
        held += _present(begin[rows], end[rows], times, table.prompt_tokens[rows])
    grows = writes & table.completed & (ends > lives.first)
    speed = table.output_tokens[grows] / (ends - lives.first)[grows]
    begin, end = lives.arrived[grows], ends[grows]
    held += times * _present(begin, end, times, speed)
    held -= _present(begin, end, times, speed * lives.first[grows])
    columns = zip(waiting, prefilling, awaited, decoding, np.maximum(held, 0.0).round(), strict=True)
    return [WorkerFrame(name, role, int(w), int(p), int(a), int(d), float(kv)) for w, p, a, d, kv in columns]


def _before(moments: Floats, times: Floats, weights: Floats | None = None) -> Floats:
    """Weight of the moments that have come at each time."""
    finite = np.isfinite(moments)
    order = np.argsort(moments[finite], kind="stable")
    summed = np.ones(len(order)) if weights is None else weights[finite][order]
    totals = np.concatenate([[0.0], np.cumsum(summed)])
    return np.asarray(totals[np.searchsorted(moments[finite][order], times, side="right")])


def _present(begin: Floats, end: Floats, times: Floats, weights: Floats | None = None) -> Floats:
    """Weight of the half-open spans that hold at each time."""
    reached = np.isfinite(begin)
    chosen = None if weights is None else weights[reached]
    return _before(begin[reached], times, chosen) - _before(end[reached], times, chosen)
