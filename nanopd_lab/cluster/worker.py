"""A worker without its model: what it does with messages, pulls and finished steps. Sans-IO.

No clock, no thread, no torch: messages, results of pulls and of steps go in with the time; messages and pulls to
start come out. `cluster.host` drives it with a real engine, the simulator with a cost model.

    Tries            what is known and told of each try, and how it ends
    BlockExchange    how blocks get from one worker to another
    WorkerCore       messages in, and the steps of the engine's loop
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace

from nanopd_lab.cluster.exchange import BlockExchange
from nanopd_lab.cluster.messages import (
    Beat,
    Begin,
    Cancel,
    Ended,
    Expect,
    Extend,
    Failed,
    Published,
    Release,
    ToWorker,
)
from nanopd_lab.cluster.tries import Try
from nanopd_lab.core import Request, SampledToken, Sequence, StepPlan
from nanopd_lab.engine.decode_run import advance, equal_steps
from nanopd_lab.errors import InvalidRequestError

MAX_STRIKES = 2  # steps that may fail under a sequence before it is given up


class WorkerCore(BlockExchange):
    """See the module; made as a `BlockExchange`."""

    # ------------------------------------------------------------------ messages

    def handle(self, message: ToWorker, now: float) -> None:
        """Take in one message."""
        self.now = now
        if isinstance(message, (Begin, Expect)):
            self._take_on(message)
            return
        each = self._tries.get(message.key)
        if each is None or each.dropped:
            return  # it has ended here; the controller knows, or will
        if isinstance(message, Published):
            each.offer, each.waits_since = message, now
            self._offered.add(each.key)
            self._pull(each)
        elif isinstance(message, (Release, Cancel)):
            self._drop(each)
        elif isinstance(message, Extend) and each.lease is not None:
            each.lease.renew(now)

    def _take_on(self, message: Begin | Expect) -> None:
        work = message.work
        params = work.params if work.params.n == 1 else replace(work.params, n=1)
        request = Request(message.key, work.prompt, params, arrival=self.now)
        try:
            if isinstance(message, Begin):
                sequence = self.scheduler.begin(request, work.index, work.outputs, message.hand_off)
                each = Try(message.key, sequence)
            else:
                sequence = self.scheduler.expect(request, work.index, work.outputs)
                each = Try(message.key, sequence, message.source, waits_since=self.now)
                each.renew_at = self.now + self.terms.renewal
        except InvalidRequestError as error:
            self.outbox += [Failed(message.key, str(error), retry=False), Ended(message.key)]
            return
        each.sent = len(work.outputs)
        self._unsampled.add(each.sequence)
        self._tries[message.key] = each
        if each.source is not None:
            self.timed[message.key] = each

    # ------------------------------------------------------------------ steps: the planner of a `StepLoop`

    def schedule(self) -> StepPlan | None:
        """The next step; reserves room for what is expected first."""
        if self.scheduler.expected:
            self._reserve()
        preempted = self.scheduler.num_preemptions
        plan = self.scheduler.schedule()
        if plan is None and self.scheduler.num_preemptions > preempted:
            plan = self.scheduler.schedule()  # the only one that ran has made room, for itself too
        if plan is not None and self._unsampled:
            for chunk in plan.chunks:
                if chunk.sequence in self._unsampled:
                    self._note_scheduled(chunk.sequence, chunk.start)
        return plan

    def start_run(self, most: int) -> int:
        """As `schedule`, for several steps at once: how many equal decode steps can be done from here, at most `most`.

        Nothing is planned yet: `finish_run` does those of them that were done, which may be fewer if something came in
        between. 0: use `schedule`. See `engine.decode_run`.
        """
        if self.scheduler.expected:
            self._reserve()
        steps = equal_steps(self.scheduler, most)
        if not steps or self._unsampled.isdisjoint(self.scheduler.running):
            return steps
        for sequence in self._unsampled.intersection(self.scheduler.running):
            self._note_scheduled(sequence, sequence.num_computed)
        return 1  # the time of that token is asked for

    def finish_run(self, steps: int, token: SampledToken) -> None:
        """`steps` decode steps were done that `start_run` has allowed; every one gave every sequence this token."""
        told = list(self.scheduler.running)
        ended = advance(self.scheduler, steps, token)
        if not self.stream and self._unsampled.isdisjoint(told):
            told = ended
        for sequence in told:
            self._report(self._tries[sequence.request.request_id])

    def complete(self, plan: StepPlan, sampled: Seq[Seq[SampledToken]]) -> list[Sequence]:
        """Take in a step's tokens."""
        touched = self.scheduler.complete(plan, sampled)
        for sequence in touched:
            each = self._tries[sequence.request.request_id]
            each.strikes = 0
            self._report(each)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.hand_off and not sequence.finished:
                each = self._tries[sequence.request.request_id]
                if sequence in touched and sequence not in self.scheduler.held:
                    self._fail(each, f"worker {self.name}: preempted before its blocks could be pulled")
                elif sequence.num_computed >= chunk.end:  # not preempted since
                    self._publish(each, chunk.end)
        return touched

    def roll_back(self, plan: StepPlan) -> None:
        """The step failed. A sequence under which steps keep failing is given up here."""
        self.scheduler.roll_back(plan)
        for chunk in plan.chunks:
            each = self._tries.get(chunk.sequence.request.request_id)
            if each is not None and not each.sequence.finished:
                each.strikes += 1

    def step_failed(self, error: BaseException, now: float) -> None:
        """Why the step that was rolled back last failed."""
        self.now = now
        for each in [each for each in self._tries.values() if each.strikes >= MAX_STRIKES]:
            self._fail(each, f"worker {self.name}: {type(error).__name__}: {error}")

    # ------------------------------------------------------------------ looking after itself

    def beat(self) -> Beat:
        """A snapshot for the controller."""
        scheduler = self.scheduler
        prompts = [s for s in (*scheduler.waiting, *scheduler.running) if not s.is_decoding]
        return Beat(
            running=scheduler.num_running,
            waiting=len(scheduler.waiting),
            expected=len(scheduler.expected) + len(scheduler.receiving),
            held=len(scheduler.held),
            blocks_free=scheduler.allocator.num_free,
            steps=scheduler.num_steps,
            prefill_tokens=sum(s.remaining for s in prompts),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if a block, a try or a pull is lost."""
        self.scheduler.check_integrity()
        live = {s.request.request_id for s in self.scheduler._queued()}
        assert live == set(self._tries), f"known but not queued, or the reverse: {live ^ set(self._tries)}"
        pulls = {pull for each in self._tries.values() for pull in each.under_way}
        assert pulls == set(self._pulling), "a pull is lost"
