"""What a dashboard shows of one moment of a run, and how it looks back over the requests that have just ended."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from nanopd_lab.router.slo import Slo


class End(NamedTuple):
    """A request that has ended. Seconds: when, from the begin of the recording; then what it got, counted from when it
    was to be sent, None where it did not come so far; tpot_s is 0 for one token."""

    time_s: float
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    ok: bool
    route: str

    def met(self, slo: Slo) -> bool:
        """True if it got all of its tokens in time."""
        if not self.ok or self.ttft_s is None or self.tpot_s is None or self.e2e_s is None:
            return False
        return slo.met(self.ttft_s, self.tpot_s, self.e2e_s)


class Rolling(NamedTuple):
    """Of the requests that ended within a window: medians in s (None: nobody ended), and how many a second ended with
    all their tokens, and of these in time."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    completed: float = 0.0
    goodput: float = 0.0

    @classmethod
    def of(cls, ends: Sequence[End], slo: Slo, seconds: float) -> Rolling:
        """Of what has ended in so many seconds."""
        done = [end for end in ends if end.ok]
        if not done or seconds <= 0:
            return cls()
        return cls(
            median(end.ttft_s or 0.0 for end in done),
            median(end.tpot_s or 0.0 for end in done),
            len(done) / seconds,
            sum(end.met(slo) for end in done) / seconds,
        )


class WorkerFrame(NamedTuple):
    """A worker at one moment; counts are of requests.

    role: "mixed", "prefill", "decode"; or why it serves nobody: "starting", "gone"
    waiting: sent to it, and no chunk of their prompt is planned yet
    prefilling: their prompt is being computed
    awaited: it will decode them, and another has their KV
    decoding: its batch of decode steps
    kv_used, kv_total: in the recording's `kv_unit`; total 0: not known
    """

    name: str
    role: str
    waiting: int = 0
    prefilling: int = 0
    awaited: int = 0
    decoding: int = 0
    kv_used: float = 0.0
    kv_total: float = 0.0


class Frame(NamedTuple):
    """One moment.

    time_s: since the begin
    queued: in the controller, without a route
    sent, completed, failed: requests since the begin
    routes: how many that have ended took each
    """

    time_s: float
    queued: int
    sent: int
    completed: int
    failed: int
    routes: Mapping[str, int]
    rolling: Rolling
    workers: tuple[WorkerFrame, ...]

    @property
    def running(self) -> int:
        """Sent, and not ended."""
        return self.sent - self.completed - self.failed


def rolled(times: Iterable[float], ends: Sequence[End], slo: Slo, window_s: float) -> list[Rolling]:
    """At each of these times, over what ended in the `window_s` before."""
    moments = [end.time_s for end in ends]
    found = []
    for time in times:
        first, last = bisect_right(moments, time - window_s), bisect_right(moments, time)
        found.append(Rolling.of(ends[first:last], slo, min(window_s, time)))
    return found
