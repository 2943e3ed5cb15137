"""A scheduler for simulations, to which sequences that decode in lockstep cost nothing: neither a step nor a sequence.

While a sequence decodes, every step gives it one token and now and then a block. Such sequences are *parked*: taken
out of `running`, they are known by the step at which they joined, and what they have by now is written down when
somebody needs it, mostly when they end. What the scheduler asks of all of them together is kept ready:

    when the next one ends                a heap, by the number of the step
    how many need a block in step n       a count for each n modulo block_size
    how much context all have             a sum

Whatever is decided is still decided by `Scheduler`, which counts the parked ones as decodes that it has placed. As soon
as a decision could turn on one of them (too few blocks or too small a budget for all), they are put back first.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence as Seq

from nanopd_lab.core import FinishReason, SampledToken, Sequence, StepPlan
from nanopd_lab.engine.counted_tables import CountedTables
from nanopd_lab.engine.decode_run import admission_blocked
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.kv import CountedBlocks, blocks_for


class LockstepScheduler(HandoverScheduler):
    """See the module; one step at a time, and outputs that end by `max_tokens` only.

    Args:
        pool: where blocks have no place of their own, so that nobody must know meanwhile who has got which
        token: what every decode step samples for everybody; the other arguments are those of `HandoverScheduler`

    lockstepping: how many are parked
    total_context: tokens that they have in the cache, all together
    newcomers: parked since the last step was complete
    """

    def __init__(
        self,
        pool: CountedBlocks,
        *,
        token: SampledToken,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
    ) -> None:
        super().__init__(
            pool,
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            block_manager=lambda _, size: CountedTables(pool, size),
        )
        self.pool = pool
        self.token = token
        self.newcomers: list[Sequence] = []
        self._step = 0  # steps that the parked ones have done together
        self._joined: dict[Sequence, int] = {}  # the parked ones, each with the step behind which it joined
        self._needy = [0] * self.block_size  # element n % block_size: those that need a block for step n
        self._ends: list[tuple[int, int, Sequence]] = []  # a heap: last step, serial; aborted ones stay in it
        self.total_context = 0
        self._served = 0  # `serves` before the last step
        self._under_way = False  # the step that was planned last has the parked ones in it

    # ------------------------------------------------------------------ what is known of the parked ones

    def contexts(self) -> list[int]:
        """Tokens that each has in the cache."""
        return [each.num_computed + self._step - joined for each, joined in self._joined.items()]

    def blocks_taken(self, steps: int) -> int:
        """Blocks that their next so many steps take."""
        size, needy = self.block_size, self._needy
        rounds, rest = divmod(steps, size)
        first = (self._step + 1) % size
        behind = first + rest
        some = (
            sum(needy[first:behind]) if behind <= size else sum(needy[first:]) + sum(needy[: behind - size])
        )
        return rounds * self.lockstepping + some

    # ------------------------------------------------------------------ in and out

    def _park(self) -> None:
        """Take all out of `running` that decode."""
        size, step, left = self.block_size, self._step, []
        for sequence in self.running:
            computed, request = sequence.num_computed, sequence.request
            room = len(sequence.blocks) * size - computed
            plain = sequence.is_decoding and not (sequence.hand_off or sequence.in_flight or request.beam)
            if not (plain and 0 <= room < size):
                left.append(sequence)
                continue
            self._joined[sequence] = step
            self.lockstepping += 1
            self.total_context += computed
            self._needy[(step + room + 1) % size] += 1
            to_come = request.params.max_tokens - sequence.output_len
            heapq.heappush(self._ends, (step + to_come, request.serial, sequence))
            self.newcomers.append(sequence)
        self.running = left

    def write_down(self, sequence: Sequence) -> None:
        """Give a sequence what it has by now, and blocks for the step under way, if it is parked."""
        if (joined := self._joined.get(sequence)) is None:
            return
        step, size = self._step, self.block_size
        if done := step - joined:
            self._joined[sequence] = step
            sequence.append_same(self.token.token, done)
            sequence.num_computed += done
            sequence.tokens_computed += done
            sequence.cumulative_logprob += self.token.logprob * done
        more = blocks_for(sequence.num_computed + self._under_way, size) - len(sequence.blocks)
        if more > 0:
            sequence.blocks = self.pool.name(sequence.blocks, more)

    def _leave(self, sequence: Sequence) -> None:
        """Write down what a parked sequence has, and forget it here."""
        self.write_down(sequence)
        del self._joined[sequence]
        self.lockstepping -= 1
        size, computed = self.block_size, sequence.num_computed
        self._needy[(self._step + len(sequence.blocks) * size - computed + 1) % size] -= 1
        self.total_context -= computed

    def unpark(self) -> None:
        """Put all back into `running`, as if they had never been away."""
        for place, sequence in enumerate(sorted(self._joined, key=_priority)):
            if sequence not in self.newcomers:
                sequence.last_served = self._served + place + 1
            self._leave(sequence)
            bisect.insort(self.running, sequence, key=_priority)
        self._ends.clear()
        self.newcomers.clear()

    # ------------------------------------------------------------------ runs of steps

    def run_length(self, most: int) -> int:
        """As `decode_run.equal_steps`, in time that does not depend on how many decode."""
        if self.running:
            self._park()
        count = self.lockstepping
        if not count or self.running or count > self.budget or (self.waiting and not admission_blocked(self)):
            return 0
        ends = self._ends
        while ends[0][2] not in self._joined:
            heapq.heappop(ends)
        if (left := ends[0][0] - self._step) < most:
            most = left
        free = self.pool.num_free
        if count * (most // self.block_size + 1) > free:
            low = 0  # the most steps whose blocks are there
            while low < most:
                middle = (low + most + 1) // 2
                low, most = (middle, most) if self.blocks_taken(middle) <= free else (low, middle - 1)
        return most

    def advance(self, steps: int) -> list[Sequence]:
        """Do so many steps, at most `run_length`; returns newcomers and the sequences that ended, by priority. What
        those have that did not end, `write_down` says."""
        if blocks := self.blocks_taken(steps):
            self.pool.take(blocks)
        self.num_steps += steps
        self.serves += steps * self.lockstepping
        self._served = self.serves - self.lockstepping
        return self._done(steps)

    def _done(self, steps: int) -> list[Sequence]:
        self._step = step = self._step + steps
        self.total_context += steps * self.lockstepping
        newcomers, ends = self.newcomers, self._ends
        if newcomers:
            self.newcomers = []
        ended: list[Sequence] = []
        while ends and ends[0][0] <= step:
            sequence = heapq.heappop(ends)[2]
            if sequence in self._joined:
                self.finish(sequence, FinishReason.LENGTH)
                ended.append(sequence)
        if not newcomers:
            return ended
        told = ended + [each for each in newcomers if each not in ended]
        return told if len(told) == 1 else sorted(told, key=_priority)

    # ------------------------------------------------------------------ single steps

    def schedule(self) -> StepPlan | None:
        """As in `Scheduler`; the chunks of the parked ones are not listed in the plan, which may be without any."""
        if self.running:
            self._park()
        if not self.lockstepping:
            return super().schedule() if self.running or self.waiting else None
        if self._could_turn_on_one():
            self.unpark()
            return super().schedule()
        if blocks := self._needy[(self._step + 1) % self.block_size]:
            self.pool.take(blocks)
        self._under_way = True
        self._served = self.serves
        self.serves += self.lockstepping
        plan = super().schedule()
        if plan is None:
            self.num_steps += 1
            plan = StepPlan(self.num_steps, ())
        return plan

    def _could_turn_on_one(self) -> bool:
        """True if a parked sequence may not get its token, or have to make room for a prompt."""
        if self.lockstepping > self.budget:
            return True
        if self.running and any(each.is_decoding for each in self.running):
            return True
        return self._blocks_needed() > self.pool.num_free

    def complete(self, plan: StepPlan, sampled: Seq[Seq[SampledToken]]) -> list[Sequence]:
        """As in `Scheduler`; of the parked ones only newcomers and those that ended are returned."""
        touched: list[Sequence] = []
        if self._under_way:
            self._under_way = False
            touched = self._done(1)
        return [*touched, *super().complete(plan, sampled)]

    def roll_back(self, plan: StepPlan) -> None:
        """As in `Scheduler`. The parked ones lose the step and nothing else."""
        self.unpark()
        self._under_way = False
        super().roll_back(plan)

    # ------------------------------------------------------------------ hooks of the schedulers

    def _dequeue(self, sequence: Sequence) -> None:
        if sequence in self._joined:
            self._leave(sequence)
        else:
            super()._dequeue(sequence)

    @property
    def promised(self) -> int:
        return len(self.receiving) + self.lockstepping

    @property
    def num_running(self) -> int:
        return len(self.running) + self.lockstepping

    def _blocks_needed(self) -> int:
        return super()._blocks_needed() + self._needy[(self._step + 1) % self.block_size]

    def _queued(self) -> list[Sequence]:
        return [*super()._queued(), *self._joined]

    def check_integrity(self) -> None:
        for sequence in self._joined:
            self.write_down(sequence)
        super().check_integrity()


def _priority(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.serial, sequence.index
