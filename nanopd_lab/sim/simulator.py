"""A cluster in virtual time. Controller, workers, schedulers and policies are those that really run; only what they
drive is replaced: steps by a cost model, the transport by `Links`, pipes by a delay, callers by a list.

    requests ──ARRIVAL──► Controller ──MESSAGE──► SimWorker ──LOOP──► … ──MESSAGE──► Controller ──► RequestRecord
                                                     │  ▲
                                                     └PULL (Links)

Runs of equal decode steps are jumped over (`skip`), so that the cost grows with events and not with tokens; times and
accounts are those of the simulation step by step. Without a prefix cache decoding sequences cost nothing even in steps
that they share with prompts (`engine.lockstep`), and blocks are counted and not named (`kv.counted`). Callers count as
told of each token when it is sampled, though the controller hears of the first and the last only: what a worker that
dies had sampled is kept, and is not computed again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanopd_lab.cluster.actions import (
    ClusterBusyError,
    ClusterDownError,
    Emit,
    Fence,
    Send,
    Settled,
)
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.messages import Capacity, FromWorker, Hello, ToWorker
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.engine.lockstep import LockstepScheduler
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.kv import BlockAllocator, CountedBlocks
from nanopd_lab.router import Policy, Role
from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.config import SimConfig
from nanopd_lab.sim.core import TOKEN, SimCore
from nanopd_lab.sim.host import Host
from nanopd_lab.sim.links import Flow, Links
from nanopd_lab.sim.results import PullSpan, RequestRecord, SimResult, WorkerTotals
from nanopd_lab.sim.timing import StepTime
from nanopd_lab.sim.worker import Outgoing, SimWorker, StepSpan
from nanopd_lab.sim.workload import Kill, SimRequest, in_order
from nanopd_lab.transfer import Pull, PullResult, PullStatus

_NEVER = float("inf")


@dataclass(eq=False, slots=True)
class _PullUnderWay:
    worker: SimWorker
    source: SimWorker
    pull: Pull
    table: int  # the first block of the one that it is from


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: it walks over all that lives, again and again, and finds no cycles."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Simulator:
    """One simulation; `run` it once.

    Args:
        policy, roles: as of `create_policy`; workers are named w0, w1, …
        time: how long steps take
        requests: in any order
        kills: workers that die
        queue: a clock that others share; None: its own
    """

    def __init__(
        self,
        policy: Policy,
        roles: Sequence[Role],
        time: StepTime,
        requests: Iterable[SimRequest],
        config: SimConfig | None = None,
        kills: Iterable[Kill] = (),
        queue: EventQueue | None = None,
    ) -> None:
        self.config = config or SimConfig()
        self.time = time
        self.requests = in_order(requests)
        self.queue = EventQueue() if queue is None else queue
        self.host = Host(self.config.company) if self.config.company else None
        self.links = Links(self.config.link, self.queue, self._pull_ended)
        self.names = [f"w{number}" for number in range(len(roles))]
        self._ranks = {name: rank for rank, name in enumerate(self.names)}
        self.controller = Controller(policy, dict(zip(self.names, roles, strict=True)), self.config.limits)
        self.workers: dict[str, SimWorker] = {}
        self.spans: list[StepSpan] = []
        self.pulls: list[PullSpan] = []
        self._lives = 0
        self._flows: dict[tuple[SimWorker, int], Flow] = {}
        self._records: dict[str, RequestRecord | SimRequest] = {
            each.request_id: each for each in self.requests
        }
        if len(self._records) != len(self.requests):
            raise ValueError("two requests have the same request_id; each needs its own")
        self._ends: dict[str, Emit] = {}
        self._arrived = 0
        self._open = len(self.requests)  # neither settled nor refused
        self._totals: list[WorkerTotals] = []
        self._outgoing = Outgoing(self._from_worker, self._start_pull, self._cancel_pull)
        for name in self.names:
            self._start(name)
        for kill in kills:
            if kill.worker not in self.workers:
                raise ValueError(f"worker {kill.worker!r} is to be killed; there are {', '.join(self.names)}")
            self.queue.push(kill.time, Kind.FAULT, partial(self._strike, kill))

    # ------------------------------------------------------------------ the loop

    def run(self) -> SimResult:
        """Serve all requests.

        Raises:
            AssertionError: nothing is left to happen, and requests are not served: a bug.
            Exception: what the policy has raised, where a cluster would fail one request and serve the others.
        """
        with uncollected():
            self._serve()
        for name, worker in self.workers.items():
            self._close(name, worker, killed=False)
        records = [self._records[request.request_id] for request in self.requests]
        return SimResult(
            [record for record in records if isinstance(record, RequestRecord)],
            self._totals,
            self.queue.processed,
            self.controller.decisions,
            self.spans,
            self.pulls,
        )

    def _serve(self) -> None:
        self._schedule_arrival()
        for _ in self.queue.run() if self._open else ():
            if not self._open:
                return
        assert not self._open, f"stalled at {self.queue.now} s: {self._open} requests open"

    # ------------------------------------------------------------------ callers

    def _schedule_arrival(self) -> None:
        if self._arrived < len(self.requests):
            self.queue.push(self.requests[self._arrived].arrival, Kind.ARRIVAL, self._arrive)

    def _arrive(self, _: int) -> None:
        number, now = self._arrived, self.queue.now
        request = self.requests[number]
        self._arrived += 1
        self._schedule_arrival()
        prompt = request.prompt(number if self.config.enable_prefix_caching else None)
        try:
            self.controller.submit(request.request_id, prompt, request.params(), now, request.deadline)
        except (InvalidRequestError, ClusterBusyError, ClusterDownError) as error:
            self._records[request.request_id] = RequestRecord(
                request.request_id, now, request.prompt_tokens, 0, finish_reason="refused", error=str(error)
            )
            self._open -= 1
        if request.deadline != _NEVER:
            self.queue.push(max(now, request.deadline), Kind.WAKE, self._deadline)
        self._collect()

    def _deadline(self, _: int) -> None:
        self.controller.tick(self.queue.now)
        self._collect()

    def _settled(self, settled: Settled) -> None:
        if self.controller.policy_error is not None:
            raise self.controller.policy_error  # nobody else is to be served: it is for whoever wrote the policy
        path, end = settled.path, self._ends.pop(settled.request_id)
        last = path.last
        firsts = [attempt.first_token for attempt in path.attempts if attempt.first_token is not None]
        self._open -= 1
        self._records[settled.request_id] = RequestRecord(
            settled.request_id,
            path.arrival,
            path.prompt_tokens,
            path.output_tokens,
            last.prefill.scheduled if last and last.prefill else None,
            min(firsts) if firsts else None,
            path.finished,
            str(end.finish_reason),
            end.error,
            path,
        )

    # ------------------------------------------------------------------ messages

    def _from_worker(self, worker: SimWorker, messages: list[FromWorker]) -> None:
        name, now = worker.core.name, self.queue.now
        if self.config.message_s:
            come = partial(self._come, worker)
            for message in messages:
                worker.in_transit.append(message)
                self.queue.push(now + self.config.message_s, Kind.MESSAGE, come)
            return
        controller = self.controller
        for message in messages:
            controller.handle(name, message, now)
        if controller.actions:
            self._collect()

    def _come(self, worker: SimWorker, _: int) -> None:
        """The controller gets a worker's next message."""
        if worker.alive:
            self.controller.handle(worker.core.name, worker.in_transit.popleft(), self.queue.now)
            self._collect()

    def _send(self, name: str, message: ToWorker) -> None:
        worker = self.workers.get(name)
        if worker is None:
            return
        if self.config.message_s:
            deliver = partial(self._deliver, worker, message)
            self.queue.push(self.queue.now + self.config.message_s, Kind.MESSAGE, deliver)
        else:
            worker.deliver(message)

    @staticmethod
    def _deliver(worker: SimWorker, message: ToWorker, _: int) -> None:
        if worker.alive:
            worker.deliver(message)

    def _collect(self) -> None:
        """Carry out what the controller has decided."""
        controller = self.controller
        while actions := controller.actions:
            controller.actions = []
            for action in actions:
                if isinstance(action, Send):
                    self._send(action.worker, action.message)
                elif isinstance(action, Settled):
                    self._settled(action)
                elif isinstance(action, Emit):
                    if action.finish_reason is not None:
                        self._ends[action.request_id] = action
                elif isinstance(action, Fence) and action.worker in self.workers:
                    self._kill(action.worker, action.reason, None)

    # ------------------------------------------------------------------ pulls

    def _start_pull(self, worker: SimWorker, pull: Pull) -> None:
        source, now = self.workers.get(pull.source), self.queue.now
        if source is None:
            worker.deliver(
                PullResult(pull.pull_id, PullStatus.FAILED, now, now, error=f"not connected to {pull.source}")
            )
            return
        blocks = len(pull.source_blocks)
        flow = self.links.start(
            pull.source,
            worker.core.name,
            blocks,
            blocks * self.config.block_bytes,
            _PullUnderWay(worker, source, pull, worker.core.table_of(pull.pull_id)),
        )
        self._flows[worker, pull.pull_id] = flow

    def _cancel_pull(self, worker: SimWorker, number: int) -> None:
        flow = self._flows.get((worker, number))
        if flow is not None:
            self.links.end(flow)
            self._pull_ended(flow, "cancelled")

    def _pull_ended(self, flow: Flow, error: str | None = None) -> None:
        under_way, now = flow.payload, self.queue.now
        assert isinstance(under_way, _PullUnderWay)
        worker, source, pull = under_way.worker, under_way.source, under_way.pull
        del self._flows[worker, pull.pull_id]
        status, blocks = PullStatus.DONE, pull.source_blocks
        if error is not None:
            status = PullStatus.FAILED
        elif source.lost(pull, under_way.table):
            status = PullStatus.STALE
        size = len(blocks) * self.config.block_bytes if status is PullStatus.DONE else 0
        if self.config.trace:
            self.pulls.append(
                PullSpan(pull.source, worker.core.name, flow.started, now, len(blocks), size, status.value)
            )
        worker.deliver(PullResult(pull.pull_id, status, flow.started, now, size, error))

    # ------------------------------------------------------------------ workers

    def _start(self, name: str, _: int = 0) -> None:
        config = self.config
        self._lives += 1  # as hosts do: what an earlier life of a worker published is never valid again
        options: dict[str, Any] = {
            "block_size": config.block_size,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_num_seqs": config.max_num_seqs,
            "max_model_len": config.max_model_len,
        }
        scheduler: HandoverScheduler
        if config.skip and not config.enable_prefix_caching:
            pool = CountedBlocks(config.num_blocks, self._lives << 44)
            scheduler = LockstepScheduler(pool, token=TOKEN, **options)
        else:
            allocator = BlockAllocator(config.num_blocks, config.enable_prefix_caching)
            allocator.generations = [self._lives << 32] * config.num_blocks
            scheduler = HandoverScheduler(allocator, **options)
        worker = SimWorker(
            SimCore(name, scheduler, config.terms),
            self._ranks[name],
            self.queue,
            self.time,
            self._outgoing,
            config.skip,
            config.ahead,
            self.host,
            self.spans if config.trace else None,
        )
        self.workers[name] = worker
        capacity = Capacity(
            config.num_blocks,
            config.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_model_len,
            config.block_bytes,
        )
        self.controller.handle(name, Hello(capacity), self.queue.now)
        if config.beat_s is not None:
            self.queue.push(self.queue.now + config.beat_s, Kind.WAKE, partial(self._beat, worker))
        self._collect()

    def _strike(self, kill: Kill, _: int) -> None:
        if kill.worker in self.workers:
            self._kill(kill.worker, "was killed", kill.restart_after)

    def _kill(self, name: str, reason: str, restart_after: float | None) -> None:
        worker, now = self.workers.pop(name), self.queue.now
        for message in worker.stop():
            self.controller.handle(name, message, now)
        self._close(name, worker, killed=True)
        for flow in self.links.of_worker(name):
            self.links.end(flow)
            under_way = flow.payload
            assert isinstance(under_way, _PullUnderWay)
            if under_way.worker is worker:
                del self._flows[worker, under_way.pull.pull_id]
            else:
                self._pull_ended(flow, "the source is gone")
        self.controller.worker_down(name, reason, now, restarting=restart_after is not None)
        if restart_after is not None:
            self.queue.push(now + restart_after, Kind.FAULT, partial(self._start, name))
        self._collect()

    def _close(self, name: str, worker: SimWorker, killed: bool) -> None:
        scheduler = worker.core.scheduler
        stats = scheduler.allocator.stats()
        if not killed:
            worker.core.check_integrity()
        self._totals.append(
            WorkerTotals(
                name,
                worker.steps_done,
                worker.busy_s,
                scheduler.num_preemptions,
                stats.used,
                stats.peak_used,
                killed,
            )
        )

    def _beat(self, worker: SimWorker, _: int) -> None:
        assert self.config.beat_s is not None
        if worker.alive:
            worker.beat_due = True
            worker.wake()
            self.queue.push(self.queue.now + self.config.beat_s, Kind.WAKE, partial(self._beat, worker))
