"""A part of a fleet: some workers behind a controller of their own, whose decisions take time.

    front door ──offer──► requests ─┐
                                    ├──► Controller (one thing at a time) ──► SimWorker …
                          messages ─┘                                            │
                             ▲                                                   │
                             └───────────────────────────────────────────────────┘

The controller is one server: requests wait for their turn, first come first served, behind messages of workers, so that
who is being served does not wait behind who is not. What it decides it decides with what it knows at the turn's
beginning, and it gets out at its end. The caller's clock runs from the arrival at the front door.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from nanopd_lab.cluster.accounts import PathReport
from nanopd_lab.cluster.actions import ClusterBusyError, ClusterDownError, Settled
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.messages import FromWorker
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import Policy, Role
from nanopd_lab.router.policy import Decision, JobView, Postponed, WorkerView
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.config import SimConfig
from nanopd_lab.sim.results import RequestRecord, WorkerTotals
from nanopd_lab.sim.simulator import Simulator
from nanopd_lab.sim.timing import StepTime
from nanopd_lab.sim.worker import SimWorker
from nanopd_lab.sim.workload import Kill, SimRequest

MakePolicy = Callable[[], tuple[Policy, list[Role]]]
"""A policy that has seen nothing yet, and the roles to begin with."""


class ControllerTime(NamedTuple):
    """How long a controller is busy: with a request that it takes in or asks its policy about, and with a message.

    Both 0: it takes no time, as in `Simulator`.
    """

    decision_s: float = 0.0
    message_s: float = 0.0


def _firsts(path: PathReport) -> list[float]:
    return [each.first_token for each in path.attempts if each.first_token is not None]


class Counted:
    """A policy that counts how often it is asked; all else goes through."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.name, self.asks = policy, policy.name, 0
        if (finished := getattr(policy, "finished", None)) is not None:
            self.finished = finished

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        """See `Policy`."""
        self.asks += 1
        return self.policy.choose(job, workers, now)


class Shard(Simulator):
    """See the module. The front door calls `offer`.

    Args:
        number: in the fleet
        policy: makes a new one, also after the controller has died
        settled: called with each request's record
        kills: with the names that workers have in here, from w0 on
    """

    def __init__(
        self,
        number: int,
        policy: MakePolicy,
        time: StepTime,
        queue: EventQueue,
        config: SimConfig,
        busy: ControllerTime,
        settled: Callable[[RequestRecord], None],
        kills: Iterable[Kill] = (),
    ) -> None:
        self.number, self.busy, self.down = number, busy, False
        self.open: dict[str, tuple[SimRequest, int]] = {}  # offered here, not settled; with its number
        self.stranded: list[
            tuple[SimRequest, int]
        ] = []  # offered to a controller that was dead, or that has died
        self.clock: Callable[[], float] | None = None  # times the controller's own work, if there is one
        self.submitted, self.submit_s, self.handle_s = 0, 0.0, 0.0  # by that clock
        self.waits: list[float] = []  # of each request, for the controller's turn, s
        self.busy_s = 0.0  # of the controller
        self.messages = 0  # that it has taken in, where they take time
        self.lost_tokens = 0  # whose KV was on workers that died
        self.past_decisions = 0  # of controllers that have died
        self._told = settled
        self._policy = policy
        self._requests: deque[tuple[float, str]] = deque()  # with when they came
        self._messages: deque[SimWorker] = deque()  # whose next message it is
        self._done_at = 0  # the order of the event at which the controller's turn ends; 0: it has none
        chosen, roles = policy()
        self.counted = Counted(chosen)
        super().__init__(self.counted, roles, time, (), config, kills, queue)

    # ------------------------------------------------------------------ requests

    def offer(self, request: SimRequest, number: int) -> None:
        """The front door has sent a request; `number` is its place among all arrivals."""
        if self.down:
            self.stranded.append((request, number))  # nobody answers; the front door will notice
            return
        self.open[request.request_id] = request, number
        if not (self.busy.decision_s or self.busy.message_s):
            self.waits.append(0.0)
            self._submit(request, number)
            self._collect()
            return
        self._requests.append((self.queue.now, request.request_id))
        self._next()

    def _submit(self, request: SimRequest, number: int) -> None:
        now = self.queue.now
        prompt = request.prompt(number if self.config.enable_prefix_caching else None)
        self._records[request.request_id] = request
        begun = self.clock() if self.clock else 0.0
        try:
            self.controller.submit(request.request_id, prompt, request.params(), now)
        except (InvalidRequestError, ClusterBusyError, ClusterDownError) as error:
            self._tell(
                RequestRecord(
                    request.request_id,
                    now,
                    request.prompt_tokens,
                    0,
                    finish_reason="refused",
                    error=str(error),
                )
            )
        if self.clock:
            self.submit_s += self.clock() - begun
        self.submitted += 1

    def _settled(self, settled: Settled) -> None:
        super()._settled(settled)
        record = self._records[settled.request_id]
        assert isinstance(record, RequestRecord)
        self._tell(record)

    def _tell(self, record: RequestRecord) -> None:
        request, _ = self.open.pop(record.request_id)
        record.arrival = request.arrival  # and not when the controller took it in
        del self._records[record.request_id]
        self._told(record)

    # ------------------------------------------------------------------ the controller's time

    def _from_worker(self, worker: SimWorker, messages: list[FromWorker]) -> None:
        if self.config.message_s or not (self.busy.decision_s or self.busy.message_s):
            super()._from_worker(worker, messages)
            return
        for message in messages:
            worker.in_transit.append(message)
            self._messages.append(worker)
        self._next()

    def _come(self, worker: SimWorker, _: int) -> None:
        if not (self.busy.decision_s or self.busy.message_s):
            super()._come(worker, _)
        elif worker.alive:
            self._messages.append(worker)
            self._next()

    def _next(self) -> None:
        """Take in what waits, until something takes time."""
        now = self.queue.now
        while not self._done_at:
            asks = self.counted.asks
            if self._messages:
                worker = self._messages.popleft()
                if not worker.alive:
                    continue
                self.messages += 1
                self._handle(worker.core.name, worker.in_transit.popleft())
                seconds = self.busy.message_s + self.busy.decision_s * (self.counted.asks - asks)
            elif self._requests:
                came, request_id = self._requests.popleft()
                self.waits.append(now - came)
                self._submit(*self.open[request_id])
                seconds = self.busy.decision_s * max(1, self.counted.asks - asks)
            else:
                return
            if now + seconds > now:
                self.busy_s += seconds
                self._done_at = self.queue.push(now + seconds, Kind.MESSAGE, self._turn_ends)
            else:
                self._collect()

    def _handle(self, name: str, message: FromWorker) -> None:
        begun = self.clock() if self.clock else 0.0
        self.controller.handle(name, message, self.queue.now)
        if self.clock:
            self.handle_s += self.clock() - begun

    def _turn_ends(self, turn: int) -> None:
        if turn == self._done_at:
            self._done_at = 0
            self._collect()
            self._next()

    # ------------------------------------------------------------------ failures

    def fail(self, restart_s: float) -> None:
        """The controller dies, and all that it knew: its workers begin anew with the next one, `restart_s` later.

        Its requests are `stranded`, until the front door gives it up.
        """
        self.down = True
        self._requests.clear()
        self._messages.clear()
        self._done_at = 0
        for name, worker in list(self.workers.items()):
            worker.stop()
            self.lost_tokens += worker.core.held_tokens()
            self._close(name, worker, killed=True)
        self.workers.clear()
        for flow in list(self.links.flows):
            self.links.end(flow)
        self._flows.clear()
        self._ends.clear()
        self._records.clear()
        self.stranded += self.open.values()
        self.open.clear()
        self.queue.push(self.queue.now + restart_s, Kind.FAULT, self._restart)

    def take_back(self) -> list[tuple[SimRequest, int]]:
        """Those that are stranded; they are no longer this one's."""
        lost, self.stranded = self.stranded, []
        return lost

    def _restart(self, _: int) -> None:
        self.down = False
        self.past_decisions += self.controller.decisions
        chosen, roles = self._policy()
        self.counted = Counted(chosen)
        self.controller = Controller(
            self.counted, dict(zip(self.names, roles, strict=True)), self.config.limits
        )
        for name in self.names:
            self._start(name)

    def _start(self, name: str, _: int = 0) -> None:
        if not self.down and name not in self.workers:  # else it has begun with a new controller
            super()._start(name)

    def _kill(self, name: str, reason: str, restart_after: float | None) -> None:
        worker = self.workers[name]
        super()._kill(name, reason, restart_after)
        self.lost_tokens += worker.core.held_tokens()

    # ------------------------------------------------------------------ the end

    @property
    def load(self) -> int:
        """Requests that were offered here and have not settled."""
        return len(self.open) + len(self.stranded)

    @property
    def decisions(self) -> int:
        """Routes that were decided."""
        return self.past_decisions + self.controller.decisions

    def may_please(self, slo: Slo) -> bool:
        """True if one that is open may still be served as promised."""
        now = self.queue.now
        for request, _ in (*self.open.values(), *self.stranded):
            latest = request.arrival + slo.ttft_s
            if now > min(latest + (request.output_tokens - 1) * slo.tpot_s, request.arrival + slo.e2e_s):
                continue
            path = self.controller.path_of(request.request_id)
            if now <= latest or (path and min(_firsts(path), default=math.inf) <= latest):
                return True
        return False

    def left_open(self) -> list[RequestRecord]:
        """Records of those that have not settled, as far as they have come."""
        return [self._unfinished(request) for request, _ in (*self.open.values(), *self.stranded)]

    def _unfinished(self, request: SimRequest) -> RequestRecord:
        path = self.controller.path_of(request.request_id)
        return RequestRecord(
            request.request_id,
            request.arrival,
            request.prompt_tokens,
            path.output_tokens if path else 0,
            first_token=min(_firsts(path), default=None) if path else None,
            finish_reason="open",
            error=f"not finished at {self.queue.now:g} s, when the simulation ended",
            path=path,
        )

    def close(self, whole: bool) -> list[WorkerTotals]:
        """Totals of all workers; `whole`: everything is over, and nothing may be left."""
        for name, worker in self.workers.items():
            self._close(name, worker, killed=not whole)
        return self._totals
