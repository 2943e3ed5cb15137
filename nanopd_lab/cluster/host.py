"""A worker with its engine and transport: one turn takes in messages, pulls and at most one step.

The launchers differ in who calls `turn`: a loop over all hosts in one thread (`inline`), or a loop in a process of
its own (`worker_loop`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from nanopd_lab.cluster.messages import Capacity, FromWorker, Hello, ToWorker
from nanopd_lab.cluster.worker import WorkerCore
from nanopd_lab.core import SampledToken, Sequence, StepPlan
from nanopd_lab.engine.loop import Launched, StepLoop
from nanopd_lab.transfer import PoolAddress, PullResult, PullStatus, TransferError, Transport


@dataclass(frozen=True)
class Connect:
    """Another worker's pool can be reached there from now on."""

    address: PoolAddress


@dataclass(frozen=True)
class Disconnect:
    """Another worker is gone."""

    worker: str


class Runner(Protocol):
    """What executes plans: `ModelRunner`, or a stand-in of the tests."""

    def launch(self, plan: StepPlan) -> Launched:
        """Put the plan on the device's queue."""
        ...


@dataclass(frozen=True)
class StepRecord:
    """One step for the timeline: when, and (key, tokens, whether it is a decode step) of each chunk.

    It begins when it is planned, or, where steps are launched ahead, not before the end of the one before it.
    """

    begin: float
    end: float
    chunks: tuple[tuple[str, int, bool], ...]

    def shifted(self, by_s: float) -> StepRecord:
        """The same on a clock that is so many seconds ahead."""
        return replace(self, begin=self.begin + by_s, end=self.end + by_s)


class Findings(NamedTuple):
    """What is wrong with a worker; each is empty if nothing is.

    broken: a block, a try or a pull is lost
    held: what it holds, which is wrong while nothing runs
    """

    broken: str = ""
    held: str = ""


@dataclass(eq=False)
class WorkerHost:
    """Drives one `WorkerCore`.

    Args:
        core: what it decides
        runner: what computes
        transport: what copies; `address` is that of the own pool there
        capacity: told to the controller
        ahead: launch a step before the last one's tokens are known
        pull_seconds: deadline of one pull
        clock: seconds; of this worker, and of its transport
        post: sends at once what is not the result of a step, so that it need not wait for the next one
    """

    core: WorkerCore
    runner: Runner
    transport: Transport
    capacity: Capacity
    address: PoolAddress | None = None
    ahead: bool = False
    pull_seconds: float = 30.0
    clock: Callable[[], float] = time.monotonic
    steps: list[StepRecord] | None = None
    post: Callable[[list[FromWorker]], None] | None = None
    progressed: bool = False  # the last turn got on with a step
    _loop: StepLoop = field(init=False)
    _turned_at: float = field(default=-math.inf, init=False)  # when the last turn came to its step
    _ended_at: float = field(default=-math.inf, init=False)  # the last step

    def __post_init__(self) -> None:
        self._loop = StepLoop(self, self.runner.launch, self.ahead)

    def hello(self) -> Hello:
        """The first message."""
        return Hello(self.capacity, self.address)

    def turn(self, messages: Iterable[ToWorker | Connect | Disconnect]) -> list[FromWorker]:
        """Take in what has come, do one step, return what is to be sent.

        A step that raises is rolled back; its sequences are tried once more and then given up, one by one.
        """
        core, now = self.core, self.clock()
        for message in messages:
            if isinstance(message, Connect):
                self._connect(message.address)
            elif isinstance(message, Disconnect):
                self.transport.disconnect(message.worker)
            else:
                core.handle(message, now)
        self._pulls()
        core.tick(self.clock())
        # A step that is under way was launched by the turn before this one.
        begin, done = core.now if self._loop.under_way is None else self._turned_at, None
        self._turned_at = core.now
        try:
            done = self._loop.step()
        except Exception as error:
            core.step_failed(error, self.clock())
        self.progressed = done is not None or self._loop.under_way is not None
        if done is not None and self.steps is not None:
            chunks = tuple(
                (c.sequence.request.request_id, c.count, c.start >= c.sequence.prompt_len)
                for c in done[0].chunks
            )
            self.steps.append(StepRecord(max(begin, self._ended_at), core.now, chunks))
            self._ended_at = core.now
        self._pulls()
        found, core.outbox = core.outbox, []
        return found

    # ------------------------------------------------------------------ the planner of the loop: the core, on time

    def schedule(self) -> StepPlan | None:
        """The core's next step; what it reserves may be pulled while the step runs."""
        self.core.now = self.clock()
        plan = self.core.schedule()
        self._pulls()
        if self.post is not None and self.core.outbox:
            found, self.core.outbox = self.core.outbox, []
            self.post(found)
        return plan

    def complete(self, plan: StepPlan, sampled: Seq[Seq[SampledToken]]) -> list[Sequence]:
        """Hand a step's tokens to the core."""
        self.core.now = self.clock()
        return self.core.complete(plan, sampled)

    def roll_back(self, plan: StepPlan) -> None:
        """A step failed."""
        self.core.roll_back(plan)

    def _pulls(self) -> None:
        core = self.core
        while True:
            for result in self.transport.poll():
                core.pull_ended(result, self.clock())
            if not core.pulls and not core.cancelled_pulls:
                return
            pulls, core.pulls = core.pulls, []
            for pull in pulls:
                now = self.clock()
                try:
                    self.transport.start(pull, now + self.pull_seconds)
                except TransferError as error:
                    failed = PullResult(pull.pull_id, PullStatus.FAILED, now, now, error=str(error))
                    core.pull_ended(failed, now)
            cancelled, core.cancelled_pulls = core.cancelled_pulls, []
            for number in cancelled:
                self.transport.cancel(number)

    def _connect(self, address: PoolAddress) -> None:
        try:
            self.transport.connect(address)
        except TransferError:
            # Pulls from there fail one by one, with the reason, and their jobs are tried on other routes.
            self.transport.disconnect(address.worker)

    @property
    def busy(self) -> bool:
        """True if a further turn may get on without a message."""
        return not self.core.idle

    def check(self) -> Findings:
        """What is wrong here."""
        core = self.core
        try:
            core.check_integrity()
        except AssertionError as error:
            return Findings(broken=f"{core.name}: {error}")
        used = core.scheduler.allocator.stats().used
        return Findings(held="" if core.idle and not used else f"{core.name} holds {used} blocks")

    def taken_steps(self) -> list[StepRecord]:
        """The record since the last time; empty if none is kept."""
        if self.steps is None:
            return []
        taken, self.steps = self.steps, []
        return taken

    def close(self) -> None:
        """Give the transport's memory back."""
        self.transport.close()
