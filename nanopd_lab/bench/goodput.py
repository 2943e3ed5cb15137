"""What a run was worth: how many requests got what they were promised, and how many a second and GPU these are.

Goodput as DistServe (Zhong et al., OSDI 2024) and `vllm bench serve --goodput` have it, but counted from when a request
was to be sent, and with those that were lost as misses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nanopd_lab.bench.disaggregation import UNFINISHED, UNSENT
from nanopd_lab.bench.metrics import sent_of
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.results import RequestRecord


class Outcome(NamedTuple):
    """What became of one request; seconds since the begin of the run.

    scheduled_s, sent_s: when it was to be sent, and when it was
    first_token_s, ended_s: None: it did not come so far (it was refused, say)
    ok: it got all of its tokens
    """

    scheduled_s: float
    sent_s: float
    first_token_s: float | None
    ended_s: float | None
    output_tokens: int
    ok: bool


class Goodput(NamedTuple):
    """Share of the requests that were in time, from 0 to 1, and how many a second and GPU these are."""

    share: float
    per_gpu: float


def outcomes_of(records: Iterable[RequestRecord]) -> list[Outcome]:
    """Of a run, measured or simulated; without requests that an interrupt kept from ending."""
    found = []
    for record in records:
        sent = sent_of(record)
        if record.finish_reason not in (UNFINISHED, UNSENT) and sent is not None:
            times = record.arrival, sent, record.first_token, record.finished
            found.append(Outcome(*times, record.output_tokens, record.ok))
    return found


def goodput(outcomes: Sequence[Outcome], slo: Slo, gpus: int) -> Goodput:
    """Requests that met all objectives, counted from the schedule: their share of all, and a second and GPU.

    The seconds are those from the first request sent to the last one ended, whatever became of it; over none, the
    second figure is 0. (0, 0) if none ended.
    """
    good, ends = 0, []
    for each in outcomes:
        if each.ended_s is not None:
            ends.append(each.ended_s)
        if each.ok and each.first_token_s is not None and each.ended_s is not None:
            decode_s, gaps = each.ended_s - each.first_token_s, each.output_tokens - 1
            tpot_s = decode_s / gaps if gaps else 0.0
            good += slo.met(each.first_token_s - each.scheduled_s, tpot_s, each.ended_s - each.scheduled_s)
    if not ends:
        return Goodput(0.0, 0.0)
    seconds = max(ends) - min(each.sent_s for each in outcomes)
    return Goodput(good / len(outcomes), good / seconds / gpus if seconds else 0.0)
