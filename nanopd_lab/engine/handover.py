"""A scheduler whose sequences may begin on one worker and go on on another.

    here first     begin(hand_off=True) ──► running ──its token is sampled──► held ──finish()──► blocks given back
    here second    expect() ──► expected ──reserve()──► receiving ──adopt()──► running ──► …

`held` blocks wait for whoever pulls them, `receiving` blocks for what is pulled into them. Both count as used;
neither kind is ever preempted, since somebody else reads or writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Seq

from nanopd_lab.core import Request, SampledToken, Sequence, StepPlan
from nanopd_lab.engine.block_manager import BlockManager
from nanopd_lab.engine.policies import ChunkPolicy, VictimPolicy, choose_victim, plan_chunks
from nanopd_lab.engine.scheduler import Scheduler
from nanopd_lab.kv import Allocator, blocks_for


class HandoverScheduler(Scheduler):
    """See the module; arguments as for `Scheduler`. One sequence a request: `n` is 1, no beams.

    expected: have no blocks yet, first come first served
    receiving: have blocks for all of their tokens, which are on their way
    held: computed, waiting to be pulled
    """

    def __init__(
        self,
        allocator: Allocator,
        *,
        block_size: int,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        chunk_policy: ChunkPolicy = plan_chunks,
        victim_policy: VictimPolicy = choose_victim,
        block_manager: Callable[[Allocator, int], BlockManager] = BlockManager,
    ) -> None:
        super().__init__(
            allocator,
            block_size=block_size,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            chunk_policy=chunk_policy,
            victim_policy=victim_policy,
            block_manager=block_manager,
        )
        self.expected: list[Sequence] = []
        self.receiving: list[Sequence] = []
        self.held: list[Sequence] = []

    # ------------------------------------------------------------------ here first

    def begin(
        self, request: Request, index: int = 0, outputs: Iterable[int] = (), hand_off: bool = False
    ) -> Sequence:
        """Queue a request, or the rest of one.

        Args:
            index: which sample of the caller's request this is
            outputs: tokens that it has already; generation goes on behind them
            hand_off: hold it when its next token is sampled

        Raises:
            InvalidRequestError: see `validate`.
        """
        sequence = self._enter(request)
        sequence.index, sequence.hand_off = index, hand_off
        sequence.tokens.extend(outputs)
        self.waiting.append(sequence)
        return sequence

    def complete(self, plan: StepPlan, sampled: Seq[Seq[SampledToken]]) -> list[Sequence]:
        """As in `Scheduler`; what is to be handed off and has got its token is held from here on."""
        touched = super().complete(plan, sampled)
        for sequence in touched:
            # One that was preempted meanwhile computes its KV once more, and is held with one token more.
            if sequence.hand_off and not sequence.finish_reason and sequence in self.running:
                self.running.remove(sequence)
                self.held.append(sequence)
        return touched

    # ------------------------------------------------------------------ here second

    def expect(self, request: Request, index: int = 0, outputs: Iterable[int] = ()) -> Sequence:
        """A sequence whose KV another worker computes. Raises InvalidRequestError as `validate` does."""
        sequence = self._enter(request)
        sequence.index = index
        sequence.tokens.extend(outputs)
        self.expected.append(sequence)
        return sequence

    def reserve(self, offered: Container[str]) -> list[Sequence]:
        """Blocks for the expected ones, in order, while there is room; returns those that now receive.

        What the prefix cache has of a sequence needs not be pulled: `num_computed` tokens of it. Running prompts
        keep the room that they still need, and preempted sequences go first.

        Args:
            offered: ids of requests whose source has begun. Room that is kept for one that has not can deadlock: two
                workers, each keeping for the other's prompts the blocks that its own prompts need to begin.
        """
        found: list[Sequence] = []
        if not self.expected or any(sequence.preemptions for sequence in self.waiting):
            return found
        begun = [each for each in self.expected if each.request.request_id in offered]
        if not begun:
            return found
        promised = self._blocks_needed()
        for sequence in begun:
            if len(self.running) + self.promised >= min(self.max_num_seqs, self.budget):
                break
            matched, evictable = self.blocks.cached(sequence)
            # And a block for its first step, which would else preempt somebody at once.
            needed = blocks_for(len(sequence.tokens) + 1, self.block_size) - matched
            if needed + promised > self.allocator.num_free - evictable:
                break
            self.expected.remove(sequence)
            self.blocks.attach_cached(sequence)
            self.blocks.extend(sequence, sequence.remaining)
            self.receiving.append(sequence)
            found.append(sequence)
        return found

    def adopt(self, sequence: Sequence, token: SampledToken) -> None:
        """All of its KV has arrived: go on with it behind `token`, which the other worker has sampled."""
        self.receiving.remove(sequence)
        sequence.tokens_received += len(sequence.tokens) - sequence.num_computed
        sequence.num_computed = len(sequence.tokens)
        if self.blocks.caching:
            self.blocks.register(sequence, sequence.num_computed)
        self._insert(self.running, sequence)
        self.append(sequence, token)

    # ------------------------------------------------------------------ hooks of `Scheduler`

    @property
    def promised(self) -> int:
        """Places among the running that are kept for what is on its way."""
        return len(self.receiving)

    def _blocks_needed(self) -> int:
        """Blocks that the running ones still take for the tokens they have."""
        return sum([self.blocks.missing(s, s.remaining) for s in self.running if s.remaining > 0])

    def _dequeue(self, sequence: Sequence) -> None:
        for queue in (self.expected, self.receiving, self.held):
            if sequence in queue:
                queue.remove(sequence)
                return
        super()._dequeue(sequence)

    def _queued(self) -> list[Sequence]:
        return [*super()._queued(), *self.expected, *self.receiving, *self.held]
