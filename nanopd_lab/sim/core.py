"""A `WorkerCore` that need not look at tokens: in virtual time they are all alike."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from functools import lru_cache

from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.cluster.tries import Try
from nanopd_lab.cluster.worker import WorkerCore
from nanopd_lab.core import SampledToken, Sequence, StepPlan
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.engine.lockstep import LockstepScheduler
from nanopd_lab.sim.timing import RunClock

TOKEN = SampledToken(0)  # what every step samples


class SimCore(WorkerCore):
    """A worker whose tokens are all alike: telling of them needs no look at each.

    With a `LockstepScheduler` it does not look at those either that only decode on.
    """

    def __init__(self, name: str, scheduler: HandoverScheduler, terms: LeaseTerms) -> None:
        super().__init__(name, scheduler, terms, stream=False)
        self.lockstep = scheduler if isinstance(scheduler, LockstepScheduler) else None

    def schedule(self) -> StepPlan | None:
        """See `WorkerCore`."""
        plan = super().schedule()
        if plan is not None and self.lockstep is not None and self.lockstep.newcomers:
            self._note_newcomers(self.lockstep)
        return plan

    def start_run(self, most: int) -> int:
        """See `WorkerCore`."""
        lockstep = self.lockstep
        if lockstep is None:
            return super().start_run(most)
        if self.scheduler.expected:
            self._reserve()
        steps = lockstep.run_length(most)
        if steps and lockstep.newcomers and self._note_newcomers(lockstep):
            return 1  # somebody's first token, which is told at once
        return steps

    def _note_newcomers(self, scheduler: LockstepScheduler) -> bool:
        """Note that those begin to run of which nobody has seen a token here. True if the controller waits for one."""
        awaited = False
        for sequence in scheduler.newcomers:
            if sequence in self._unsampled:
                self._note_scheduled(sequence, sequence.num_computed)
                awaited |= self._tries[sequence.request.request_id].usage.adopted is None
        return awaited

    def run_done(self, steps: int, run: RunClock) -> None:
        """As `finish_run`, of the first `steps` steps of `run`."""
        lockstep = self.lockstep
        if lockstep is None:
            self.finish_run(steps, TOKEN)
            return
        newcomers = lockstep.newcomers
        told = lockstep.advance(steps)
        for sequence in newcomers:
            if sequence in self._unsampled:
                each = self._tries[sequence.request.request_id]
                if each.usage.adopted is not None:
                    self._note_sampled(each, run.end(1))
        for sequence in told:
            if sequence.finish_reason or sequence in self._unsampled:
                self._report(self._tries[sequence.request.request_id])

    def _report(self, each: Try) -> None:
        usage = each.usage
        if self.lockstep is not None and usage.sampled is None and usage.adopted is None:
            self.lockstep.write_down(each.sequence)
        super()._report(each)

    def report_all(self) -> None:
        """See `WorkerCore`."""
        if self.lockstep is not None:
            self.lockstep.unpark()
        super().report_all()

    def _wanted(self, each: Try, offered: int) -> Seq[int]:
        behind = each.arrived.first  # of what is here or on its way, mostly without gaps
        for positions in each.under_way.values():
            if not isinstance(positions, range) or positions.start != behind:
                return super()._wanted(each, offered)
            behind = positions.stop
        return super()._wanted(each, offered) if each.arrived.others else range(behind, offered)

    def generations(self, blocks: Seq[int]) -> Seq[int]:
        """See `WorkerCore`; a counted block's number never comes back, and is as good as a generation."""
        if self.lockstep is None:
            return super().generations(blocks)
        if blocks:
            self.lockstep.pool.watch(blocks)
        return blocks

    def _sampled(self, sequence: Sequence, new: Seq[int]) -> tuple[SampledToken, ...]:
        return _tokens(len(new))

    def held_tokens(self) -> int:
        """Tokens whose KV is here; of one that has stopped."""
        return sum(each.sequence.num_computed for each in self._tries.values())

    def table_of(self, pull_id: int) -> int:
        """The first block of the table that this pull under way is from."""
        return self._pulling[pull_id][1].blocks[0]


@lru_cache(maxsize=512)
def _tokens(count: int) -> tuple[SampledToken, ...]:
    return (TOKEN,) * count
