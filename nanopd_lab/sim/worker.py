"""A `WorkerCore` in virtual time: what `cluster.host` does with a device and a transport, done by the clock.

One turn of its loop takes in what has come, and then starts a step. Where the scheduler has nothing to decide for a
while, it starts a run of equal decode steps instead, which is cut short after the step under way as soon as something
comes in. Unlike the host it sends what it has to say before the next step and not after it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nanopd_lab.cluster.messages import Expect, FromWorker, ToWorker
from nanopd_lab.core import StepPlan
from nanopd_lab.engine.decode_run import taken_by_then
from nanopd_lab.kv import BlockAllocator
from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.core import TOKEN, SimCore
from nanopd_lab.sim.host import Host, Progress
from nanopd_lab.sim.timing import RunClock, StepTime
from nanopd_lab.transfer import Pull, PullResult

_ONE, _NONE = (TOKEN,), ()
_LONGEST_RUN = 1 << 30


@dataclass(frozen=True)
class StepSpan:
    """What a worker did from `begin` to `end` (s): `steps` equal steps, or one.

    sequences: in each step; prefill_tokens: computed in it for prompts (or again, after a preemption)
    """

    worker: str
    begin: float
    end: float
    steps: int
    sequences: int
    prefill_tokens: int


@dataclass(frozen=True)
class Outgoing:
    """What the simulator does for a worker: take its messages, its pulls, its cancellations of pulls."""

    messages: Callable[[SimWorker, list[FromWorker]], None]
    pull: Callable[[SimWorker, Pull], None]
    cancel: Callable[[SimWorker, int], None]


@dataclass(eq=False)
class SimWorker:
    """See the module.

    rank: orders the loops of workers that come round at the same time
    skip: start runs; without it every step is planned by itself
    ahead: as an engine that plans a step while the one before it runs: what comes in during a step finds the next one
        planned already, and waits for the one after it
    host: what it shares with other workers, which makes a step under way faster or slower; None: it has its own
    spans: where to write down what it does
    """

    core: SimCore
    rank: int
    queue: EventQueue
    time: StepTime
    outgoing: Outgoing
    skip: bool = True
    ahead: bool = False
    host: Host | None = None
    spans: list[StepSpan] | None = None
    inbox: deque[tuple[float, ToWorker | PullResult]] = field(default_factory=deque)  # with when it came
    in_transit: deque[FromWorker] = field(default_factory=deque)  # on their way to the controller
    alive: bool = True
    beat_due: bool = False
    busy_s: float = 0.0
    steps_done: int = 0
    _plan: StepPlan | None = None
    _run: RunClock | None = None
    _steps: int = 0  # of the run, as far as it is known to go
    _began: float = 0.0
    _progress: Progress | None = None  # of the step or run under way, on a host that is shared
    _work_s: float = 0.0  # of the step under way there
    _come_round: Callable[[int], None] = field(init=False)  # the event: `_loop`, bound once
    _turn: int = 0  # the order of the event at which the loop comes round next, 0 if there is none
    _wake_at: float = -math.inf  # the last one asked for

    def __post_init__(self) -> None:
        self._come_round = self._loop

    # ------------------------------------------------------------------ being called

    def deliver(self, message: ToWorker | PullResult) -> None:
        """Something has come; it is looked at when the loop comes round."""
        now, run = self.queue.now, self._run
        if run is None:
            self.inbox.append((now, message))
            self.wake()
            return
        over = self._over(run)
        # A worker that plans ahead has planned one step more, and looks behind it.
        seen = over + 2 if self.ahead and run.end(over) < now else over + 1
        if isinstance(message, Expect) and seen <= self._steps and not self.inbox and self.host is None:
            core = self.core
            if not core.scheduler.blocks.caching:
                # It waits for its source and stops nobody: no need to cut the run short.
                core.handle(message, run.end(seen))
                self._watch()
                if core.outbox:  # refused
                    self._cut(run, seen)
                return
        self.inbox.append((now, message))
        self._cut(run, seen)

    def wake(self) -> None:
        """Let the loop come round as soon as it can: now, or after the step under way."""
        if (run := self._run) is not None:
            self._cut(run, self._over(run) + 1)
        elif self._plan is None and not self._turn:
            self._turn = self.queue.push(self.queue.now, Kind.LOOP, self._come_round, self.rank)

    def _over(self, run: RunClock) -> int:
        """How many steps of the run under way are over."""
        return run.count(self._steps, self.queue.now, self.queue.passed(Kind.LOOP, self.rank))

    def _cut(self, run: RunClock, steps: int) -> None:
        """Let the run end after so many steps, if it would go on."""
        if steps < self._steps:
            self._steps = steps
            self._turn = self.queue.push(run.end(steps), Kind.LOOP, self._come_round, self.rank)

    def _timer(self, _: int) -> None:
        """Something may be due by now, unless it has been settled since."""
        if not self.alive:
            return
        if (due := self.core.next_wakeup()) is not None and due <= self.queue.now:
            self.wake()
        else:
            self._watch()

    def _loop(self, turn: int) -> None:
        """The loop comes round: take in what has come, start the next step. `turn` is the event's order."""
        if turn != self._turn:
            return  # called off
        self._turn = 0
        core, now, run, plan = self.core, self.queue.now, self._run, self._plan
        core.now = now
        if run is not None:
            self._run = None
            self._note(now, self._steps)
            core.run_done(self._steps, run)
        elif plan is not None:
            self._plan = None
            self._note(now, 1, plan)
            core.complete(plan, [_ONE if chunk.samples else _NONE for chunk in plan.chunks])
        if core.outbox:
            self._send()
        if self.inbox:
            seen = now
            if self.ahead:  # what had come when this step was planned, as the last one began
                seen = run.end(self._steps - 1) if run else self._began if plan else now
            self._take_in(seen)
        if core.timed and self._wake_at <= now:
            core.tick(now)
            self._send()
        if self.beat_due:
            self.beat_due = False
            core.outbox.append(core.beat())
            self._send()
        self._start_step(now)
        if self.inbox and self._plan is None and self._run is None:  # idle: it need not wait
            self._take_in(now)
            self._start_step(now)
        if core.outbox or core.pulls:
            self._send()
        if core.timed:
            self._watch()
        if self.host is not None:
            busy = self.alive and (self._plan is not None or self._run is not None)
            self.host.turned(self, self._progress.decodes_only if busy and self._progress else None)

    def _take_in(self, seen: float) -> None:
        """Handle what had come by then: messages first, as the host does, which then looks for ended pulls."""
        core, now, inbox = self.core, self.queue.now, self.inbox
        while inbox and inbox[0][0] <= seen:
            ended: list[PullResult] = []
            while inbox and inbox[0][0] <= seen:
                _, message = inbox.popleft()
                if isinstance(message, PullResult):
                    ended.append(message)
                else:
                    core.handle(message, now)
                    self._send()
            for result in ended:
                core.pull_ended(result, now)
                self._send()

    def stop(self) -> list[FromWorker]:
        """It dies now. Returns what it has told so far and the controller does not know yet."""
        if (run := self._run) is not None:
            done = self._over(run)
            if done:
                self.core.run_done(done, run)
            self._note(run.end(done), done)
        self._turn = 0
        self.alive = False
        if self.host is not None:
            self.host.turned(self, None)
        self.core.report_all()
        return [*self.in_transit, *self.core.outbox]

    # ------------------------------------------------------------------ steps

    def _start_step(self, now: float) -> None:
        core = self.core
        if core.idle:
            return
        steps = core.start_run(1 if self.inbox else _LONGEST_RUN) if self.skip else 0
        begin = now if self.host is None else 0.0  # on a shared host a clock counts work, not time
        if steps:
            if (lockstep := core.lockstep) is not None:
                run = RunClock(
                    self.time, begin, lockstep.lockstepping, lockstep.total_context, lockstep.contexts
                )
            else:
                contexts = [each.num_computed for each in core.scheduler.running]
                run = RunClock(self.time, begin, len(contexts), sum(contexts), lambda: contexts)
            if self.host is not None:
                self._progress = progress = self.host.begin(self, now, decodes_only=True)
                run.paced_by(progress)
            self._run, self._steps, end = run, steps, run.end(steps)
        elif (plan := core.schedule()) is not None:
            self._plan, end = plan, now + (seconds := self._seconds(plan))
            if self.host is not None:
                decodes_only = all(chunk.count == 1 for chunk in plan.chunks)
                self._progress = progress = self.host.begin(self, now, decodes_only)
                self._work_s, end = seconds, progress.when(seconds)
        else:
            return
        if not end > now:
            raise ValueError(
                f"a step of {core.name} from {now} to {end} s; the cost model must give seconds > 0"
            )
        self._began = now
        self._turn = self.queue.push(end, Kind.LOOP, self._come_round, self.rank)

    def keep_pace(self) -> None:
        """Others of the host do something else now: what is under way ends sooner or later than thought."""
        progress, run, now = self._progress, self._run, self.queue.now
        assert progress is not None, f"{self.core.name} is in no step"
        assert self.host is not None
        if (speed := self.host.speed(self, progress.decodes_only)) == progress.speed:
            return
        progress.go_on(now, speed)
        end = progress.when(self._work_s) if run is None else run.end(self._steps)
        self._turn = self.queue.push(max(now, end), Kind.LOOP, self._come_round, self.rank)

    def _seconds(self, plan: StepPlan) -> float:
        chunks = [(chunk.start, chunk.count) for chunk in plan.chunks]
        lockstep = self.core.lockstep
        if lockstep is None or not (decodes := lockstep.lockstepping):
            return self.time.seconds(chunks)
        if (mixed := getattr(self.time, "mixed_seconds", None)) is not None:
            seconds: float = mixed(decodes, lockstep.total_context, chunks)
            return seconds
        return self.time.seconds([*((context, 1) for context in lockstep.contexts()), *chunks])

    def _note(self, end: float, steps: int, plan: StepPlan | None = None) -> None:
        self.busy_s += end - self._began
        self.steps_done += steps
        if self.spans is None or not steps:
            return
        if plan is None:
            sequences, prefill = self.core.scheduler.num_running, 0
        else:
            sequences = len(plan.chunks) + self.core.scheduler.lockstepping
            prefill = sum(c.count for c in plan.chunks if c.start < c.sequence.prompt_len or c.count > 1)
        self.spans.append(StepSpan(self.core.name, self._began, end, steps, sequences, prefill))

    def lost(self, pull: Pull, table: int) -> bool:
        """True if a block that was pulled from here has been handed out anew, perhaps by the run under way, of which
        nobody has written down yet what it took. `table`: the first block of the table that the pulled ones are from.
        """
        core, planned = self.core, 0
        if self._run is not None:
            planned = min(self._steps, self._over(self._run) + 1)
        if (lockstep := core.lockstep) is not None:
            return lockstep.pool.reused(table, pull.source_blocks, lockstep.blocks_taken(planned))
        blocks, allocator = pull.source_blocks, core.scheduler.allocator
        assert isinstance(allocator, BlockAllocator)
        if core.generations(tuple(blocks)) != tuple(pull.generations):
            return True
        free = [block for block in blocks if allocator.refs[block] == 0]
        return bool(free and planned) and taken_by_then(core.scheduler, planned, free)

    # ------------------------------------------------------------------ small parts

    def _watch(self) -> None:
        """Be called when the core has something to do by itself, or before: `timer` then looks again."""
        now = self.queue.now
        if now < self._wake_at or (due := self.core.next_wakeup()) is None:
            return
        # What begins to be waited for after now is not due before then, so that nobody need look at it meanwhile.
        due = min(due, now + self.core.terms.shortest)
        self._wake_at = max(due, math.nextafter(now, math.inf))
        self.queue.push(self._wake_at, Kind.WAKE, self._timer)

    def _send(self) -> None:
        core = self.core
        while core.pulls or core.cancelled_pulls:
            pulls, core.pulls = core.pulls, []
            for pull in pulls:
                self.outgoing.pull(self, pull)
            cancelled, core.cancelled_pulls = core.cancelled_pulls, []
            for number in cancelled:
                self.outgoing.cancel(self, number)
        if core.outbox:
            messages, core.outbox = core.outbox, []
            self.outgoing.messages(self, messages)
