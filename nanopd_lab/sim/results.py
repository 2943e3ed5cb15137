"""What came out of a simulation: a record a request, figures over all of them, and checks that nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter

from nanopd_lab.cluster.accounts import PathReport
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.worker import StepSpan


@dataclass(slots=True)
class RequestRecord:
    """One request, times in seconds of the simulation. `None`: it did not come so far.

    scheduled: when the first chunk of its (last) attempt was planned
    finish_reason: "length" or "stop", or what ended it before; error: why
    path: the controller's accounts; None if it was refused
    """

    request_id: str
    arrival: float
    prompt_tokens: int
    output_tokens: int
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    finish_reason: str = "error"
    error: str | None = None
    path: PathReport | None = None

    @property
    def ok(self) -> bool:
        """True if it got all of its tokens."""
        return self.finish_reason in ("length", "stop")

    @property
    def route(self) -> str:
        """Of the last attempt, empty if there was none."""
        return str(self.path.route) if self.path and self.path.route else ""

    @property
    def waiting_s(self) -> float | None:
        """From arrival until its first chunk was planned."""
        return None if self.scheduled is None else self.scheduled - self.arrival

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, from arrival."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def e2e_s(self) -> float | None:
        """From arrival to the last token."""
        return None if self.finished is None else self.finished - self.arrival

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for an output of one token."""
        if self.finished is None or self.first_token is None or self.output_tokens < 2:
            return None
        return (self.finished - self.first_token) / (self.output_tokens - 1)

    def meets(self, slo: Slo) -> bool:
        """True if it got all of its tokens in the times promised; one that was dropped or failed did not."""
        if not self.ok or self.ttft_s is None or self.e2e_s is None:
            return False
        return slo.met(self.ttft_s, self.tpot_s or 0.0, self.e2e_s)


@dataclass(frozen=True)
class PullSpan:
    """One pull: from `source` to `target`, `begin` to `end` in s."""

    source: str
    target: str
    begin: float
    end: float
    blocks: int
    num_bytes: int
    status: str


@dataclass(frozen=True)
class WorkerTotals:
    """One worker's life (a restarted one has several): steps, time in steps, preemptions, blocks in use at the end."""

    worker: str
    steps: int
    busy_s: float
    preemptions: int
    blocks_used: int
    peak_blocks: int
    killed: bool = False


def percentile(values: Sequence[float], percent: float) -> float:
    """Of ascending values: linear interpolation between order statistics, as numpy's; nan if there are none.

    Raises:
        ValueError: `percent` lies outside [0, 100].
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percentile {percent}; it must lie in [0, 100]")
    if not values:
        return math.nan
    place = (len(values) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


@dataclass
class SimResult:
    """See the module. `records` are in order of arrival; `events` is how many the clock has taken.

    spans, pulls: what happened, if a trace was asked for
    """

    records: list[RequestRecord]
    workers: list[WorkerTotals]
    events: int
    decisions: int
    spans: list[StepSpan] = field(default_factory=list)
    pulls: list[PullSpan] = field(default_factory=list)

    @cached_property
    def completed(self) -> list[RequestRecord]:
        """Those that got all of their tokens."""
        return [record for record in self.records if record.ok]

    @cached_property
    def duration_s(self) -> float:
        """From the first arrival to the last token."""
        ends = [record.finished for record in self.records if record.finished is not None]
        return max(ends, default=0.0) - min((record.arrival for record in self.records), default=0.0)

    @property
    def request_throughput(self) -> float:
        """Completed requests a second."""
        return len(self.completed) / self.duration_s if self.duration_s else 0.0

    def attainment(self, slo: Slo) -> float:
        """Share of all requests that got what they were promised; nan without requests."""
        return (
            sum(record.meets(slo) for record in self.records) / len(self.records)
            if self.records
            else math.nan
        )

    def goodput(self, slo: Slo) -> float:
        """Requests a second that got what they were promised; the duration is that of all, drain included."""
        return sum(record.meets(slo) for record in self.records) / self.duration_s if self.duration_s else 0.0

    @property
    def output_throughput(self) -> float:
        """Output tokens of completed requests a second."""
        tokens = sum(record.output_tokens for record in self.completed)
        return tokens / self.duration_s if self.duration_s else 0.0

    @property
    def steps(self) -> int:
        """Engine steps of all workers."""
        return sum(worker.steps for worker in self.workers)

    def values(self, metric: str) -> list[float]:
        """A property of `RequestRecord` (such as "ttft_s") of all completed requests that have it."""
        return [value for value in map(attrgetter(metric), self.completed) if value is not None]

    def mean(self, metric: str) -> float:
        """Mean over completed requests; nan if there is none."""
        values = self.values(metric)
        return math.fsum(values) / len(values) if values else math.nan

    def percentile(self, metric: str, percent: float) -> float:
        """Linear interpolation between order statistics, as numpy's; nan if there is nothing to take it of.

        Raises:
            ValueError: `percent` lies outside [0, 100].
        """
        return percentile(sorted(self.values(metric)), percent)

    def problems(self) -> list[str]:
        """What is lost or doesn't add up; empty if nothing is."""
        found = [
            f"{w.worker} still holds {w.blocks_used} blocks"
            for w in self.workers
            if w.blocks_used and not w.killed
        ]
        for record in self.records:
            if record.path is None:
                if record.error is None:
                    found.append(f"{record.request_id} was neither served nor refused")
                continue
            if not record.path.complete:
                found.append(f"{record.request_id}'s accounts are not complete")
            found += [f"{record.request_id}: {problem}" for problem in record.path.problems()]
        return found
