"""An open-loop load generator over a `Cluster`.

Every request has its time before the first is sent, and is sent then, however far behind the cluster is: a thread of
its own does nothing else. Times are kept from the schedule and from sending, so that a late sender shows. With
`max_concurrency` requests wait for one of so many places, which counts from the schedule too; all at once with such a
cap is a closed loop of so many clients.

Every request is accounted for: completed, failed, refused, and after an interrupt unfinished or unsent. An interrupt,
or a cluster that is lost, ends the run and keeps what was measured.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

from nanopd_lab.bench.disaggregation import REFUSED, UNFINISHED, UNSENT
from nanopd_lab.bench.metrics import LoadRecord
from nanopd_lab.bench.workload import Workload
from nanopd_lab.cluster.actions import ClusterBusyError, ClusterDownError
from nanopd_lab.cluster.cluster import SETTLE_S, Cluster
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.core import SamplingParams
from nanopd_lab.errors import InvalidRequestError

POLL_S = 0.25  # the controller's thread stamps the tokens; asking seldom leaves it and the workers alone
LEAD_S = 0.2  # between the last preparation and the begin of the schedule
WARM_UP_TOKENS = 16  # of output, at most


@dataclass(frozen=True)
class LoadOptions:
    """How a workload is sent.

    max_concurrency: requests that may run at once; None: no cap
    num_warmups: requests before, which don't count; None: two a worker
    ready_timeout_s: for the first of all, which must succeed; 0: it is not sent
    drain_s: what is not finished so long after the last was sent is cancelled, and has failed
    temperature: of sampling; 0 is greedy
    keep_text: turn outputs into words

    Raises:
        ValueError: a setting is out of range.
    """

    max_concurrency: int | None = None
    num_warmups: int | None = None
    ready_timeout_s: float = 600.0
    drain_s: float = 600.0
    temperature: float = 0.0
    keep_text: bool = False

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ValueError(f"max_concurrency is {self.max_concurrency}; it must be at least 1, or None")
        if self.num_warmups is not None and self.num_warmups < 0:
            raise ValueError(f"num_warmups is {self.num_warmups}; it must not be negative")
        SamplingParams(temperature=self.temperature)  # which knows what it may be
        if not self.drain_s > 0 or not self.ready_timeout_s >= 0:
            raise ValueError(
                f"drain_s is {self.drain_s} and ready_timeout_s {self.ready_timeout_s}; the first must be positive, "
                "the second not negative"
            )


class Progress(NamedTuple):
    """How far a run has come."""

    elapsed_s: float
    total: int
    sent: int
    running: int
    completed: int
    failed: int


Report = Callable[[Progress], None]


@dataclass(frozen=True)
class LoadRun:
    """Records in the order of the workload; `cause` is what ended the run before its time."""

    records: list[LoadRecord]
    cause: BaseException | None = None

    @property
    def interrupted(self) -> str | None:
        """The cause in words."""
        if self.cause is None:
            return None
        return "interrupted" if isinstance(self.cause, KeyboardInterrupt) else str(self.cause)


def run_load(
    cluster: Cluster,
    workload: Workload,
    options: LoadOptions | None = None,
    report: Report | None = None,
) -> LoadRun:
    """Warm up, then serve all of `workload` at its times; returns when the last request has settled.

    The cluster's policy does not see how long outputs will be.

    Args:
        report: called a few times a second

    Raises:
        ValueError: the readiness request failed; nothing was measured.
    """
    options = options or LoadOptions()
    # Without an end-of-text token each output is as long as its max_tokens: what no policy may know.
    with cluster.veiled() if workload.ignore_eos else nullcontext():
        _warm_up(cluster, workload, options)
        return _Generator(cluster, workload, options, report or (lambda progress: None)).run()


def _warm_up(cluster: Cluster, workload: Workload, options: LoadOptions) -> None:
    """One request alone, which shows that all is well, and then some at once; their prompts are not the workload's."""
    first = workload.requests[0]
    warm = replace(
        first, output_tokens=min(first.output_tokens, WARM_UP_TOKENS), prefix_tokens=0, hash_ids=()
    )
    count = 2 * cluster.config.workers if options.num_warmups is None else options.num_warmups
    same = tuple(replace(warm, request_id=f"warm-up-{number}", arrival=0.0) for number in range(count + 1))
    prompts = Workload(same, "warm-up", seed=workload.seed + 1).tokens(cluster.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=warm.output_tokens, ignore_eos=True, detokenize=False)
    for batch in (prompts[:1] if options.ready_timeout_s else [], prompts[1:]):
        timeout = options.ready_timeout_s or None
        try:
            names = [cluster.submit(prompt, params, timeout_s=timeout) for prompt in batch]
            ends = {output.request_id: output for output in cluster.stream(names) if output.finished}
            wrong = [error for end in ends.values() if (error := end.outputs[0].error) is not None]
        except (InvalidRequestError, ClusterBusyError, ClusterDownError) as error:
            wrong = [str(error)]
        if wrong:
            raise ValueError(f"a request before the benchmark failed, nothing was measured: {wrong[0]}")


class _Generator:
    """One run. The sender adds to `_running`, the collector takes out of it; either is one atomic operation."""

    def __init__(self, cluster: Cluster, workload: Workload, options: LoadOptions, report: Report) -> None:
        self.cluster = cluster
        self.workload = workload
        self.options = options
        self.report = report
        self.prompts = workload.tokens(cluster.vocab_size)
        self.records = [
            LoadRecord(each.request_id, each.arrival, each.prompt_tokens, 0, finish_reason=UNSENT)
            for each in workload.requests
        ]
        self.next = 0
        self.begun = math.inf
        self.cause: BaseException | None = None
        self._places = options.max_concurrency or len(self.records)
        self._by_name: dict[str, LoadRecord] = {}
        self._running: set[str] = set()
        self._unsettled: dict[str, float] = {}  # ended, and since when
        self._stop = False
        self._changed = threading.Event()  # a place is free, or the sender is to stop
        self._late: set[str] = set()  # cancelled at the end of the drain
        self._pending: list[ClusterOutput] = []
        self._completed = self._failed = 0  # the collector's
        self._refused = 0  # the sender's

    def run(self) -> LoadRun:
        with _no_collection():
            self.begun = self.cluster.clock() + LEAD_S
            try:
                if self.cluster.config.launcher == "inline":
                    self._run_inline()
                else:
                    self._run_threaded()
            except (KeyboardInterrupt, RuntimeError) as error:
                self.cause = error
            finally:
                self._end()
        return LoadRun(self.records, self.cause)

    # ------------------------------------------------------------------ sending

    def _send_due(self) -> float | None:
        """Send what is due; returns seconds until the next is (infinite: no place is free), None after the last."""
        while self.next < len(self.records) and not self._stop:
            if len(self._running) >= self._places:
                return math.inf
            left = self.begun + self.records[self.next].arrival - self.cluster.clock()
            if left > 0:
                return left
            self._send(self.next)
            self.next += 1
        return None

    def _send(self, number: int) -> None:
        record, request = self.records[number], self.workload.requests[number]
        params = SamplingParams(
            temperature=self.options.temperature,
            max_tokens=request.output_tokens,
            ignore_eos=self.workload.ignore_eos,
            detokenize=self.options.keep_text,
        )
        name = f"load-{self.begun:.6f}-{number}"
        self._by_name[name] = record
        self._running.add(name)
        record.finish_reason = UNFINISHED
        record.sent = self.cluster.clock() - self.begun
        try:
            self.cluster.submit(self.prompts[number], params, name)
        except (InvalidRequestError, ClusterBusyError, ClusterDownError) as error:
            record.finish_reason, record.error = REFUSED, str(error)
            self._running.discard(name)
            self._refused += 1
            if isinstance(error, ClusterDownError):
                raise RuntimeError(str(error)) from error

    def _sender(self) -> None:
        try:
            while (left := self._send_due()) is not None:
                self._changed.wait(min(left, POLL_S))
                self._changed.clear()
        except BaseException as error:  # it would end this thread only
            self.cause = error

    # ------------------------------------------------------------------ collecting

    def _run_threaded(self) -> None:
        sender = threading.Thread(target=self._sender, name="nanopd-load", daemon=True)
        sender.start()
        try:
            capped = self.options.max_concurrency is not None
            while sender.is_alive() or not self._drained():
                if capped:
                    self._collect(POLL_S)
                else:
                    time.sleep(POLL_S)
                    self._collect(0.0)
        finally:
            self._stop = True
            self._changed.set()
            sender.join()

    def _run_inline(self) -> None:
        while (left := self._send_due()) is not None or not self._drained():
            self._collect(0.0)  # one step of every worker
            if left is not None and not self._running:
                time.sleep(min(left, POLL_S))

    def _collect(self, timeout: float) -> None:
        self._gather(timeout)
        self.report(
            Progress(
                max(0.0, self.cluster.clock() - self.begun),
                len(self.records),
                self.next,
                len(self._running),
                self._completed,
                self._failed + self._refused,
            )
        )

    def _gather(self, timeout: float) -> None:
        self._pending += self.cluster.poll(timeout)
        while self._pending:  # an interrupt loses none
            output = self._pending[-1]
            record = self._by_name.get(output.request_id)
            if record is not None and output.finished:
                self._take(record, output)
            self._pending.pop()

    def _take(self, record: LoadRecord, output: ClusterOutput) -> None:
        (sample,), metrics = output.outputs, output.metrics
        record.output_tokens, record.text = len(sample.token_ids), sample.text
        record.token_times = [each - self.begun for each in sample.token_times]
        record.scheduled = self._since_begin(metrics.first_scheduled_time)
        record.first_token = self._since_begin(metrics.first_token_time)
        record.finished = self._since_begin(metrics.finished_time)
        record.finish_reason, record.error = sample.finish_reason or "error", sample.error
        record.path = output.paths[0] if output.paths else None
        name = output.request_id
        if name in self._late and not record.ok:
            record.error = f"not finished {self.options.drain_s:g} s after the last request was sent"
        if name in self._running:
            self._running.discard(name)
            self._completed += record.ok
            self._failed += not record.ok
            self._unsettled[name] = self.cluster.clock()
            self._changed.set()
        if output.settled:
            self._unsettled.pop(name, None)

    def _since_begin(self, when: float | None) -> float | None:
        return None if when is None else when - self.begun

    def _drained(self) -> bool:
        """All have ended and settled. Cancels what takes too long."""
        now = self.cluster.clock()
        if self.cause is not None:
            return True
        if self._running and now > self.begun + (self.records[-1].sent or 0.0) + self.options.drain_s:
            self._cancel(self._running - self._late)
        return not self._running and all(now - since > SETTLE_S for since in self._unsettled.values())

    def _cancel(self, names: Sequence[str] | set[str]) -> None:
        self._late |= set(names)
        for name in names:
            self.cluster.cancel(name)

    def _end(self) -> None:
        """After an interrupt: what has come is taken, what runs is cancelled."""
        if self.cause is None:
            return
        try:
            self._gather(0.0)
            for name in list(self._running):
                self.cluster.cancel(name)
        except (RuntimeError, ValueError):
            return  # the cluster is lost


@contextmanager
def _no_collection() -> Iterator[None]:
    """What lives so far is not walked over again and again while times are taken."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
