"""Continuous batching with chunked prefill and preemption, as a pure state machine.

`schedule()` says what the next step computes, `complete()` takes what it sampled. No clock, no thread, no
torch: the engine drives it in real time and the simulator in virtual time.

The next step may be planned before the one under way is complete: a decoding sequence then goes on with a
`PENDING` token, which `complete()` fills in. What needs the token itself (more samples, beams, the last token
allowed) waits for it. If the token turns out to end the sequence, what the next step computes for it is
dropped. Steps run in the order in which they were planned, so blocks that are given back may be handed on at
once, even while an earlier step still uses them.

The life of a sequence:

    waiting ──admit──► running ──────────────► finished
       ▲                  │  (stop token, length, abort, error)
       └────preempt───────┘  blocks given back, KV recomputed later (mostly from the prefix cache)

Rules, in the order in which a step is filled:

1.  Every running decode gets one token. If the budget is smaller than their number, those served longest ago
    go first. A decode that needs a block when none is free takes it from the youngest running sequence.
2.  Waiting sequences are admitted first come, first served, and only if the pool holds their whole prompt
    beside what the running prompts still need: a prompt that is started can be finished.
3.  The chunk policy divides what is left of the budget among the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Seq
from itertools import chain

from nanopd_lab.core import (
    PENDING,
    BlockCopy,
    Chunk,
    FinishReason,
    Request,
    SampledToken,
    Sequence,
    StepPlan,
)
from nanopd_lab.engine.block_manager import BlockManager
from nanopd_lab.engine.policies import ChunkPolicy, VictimPolicy, choose_victim, plan_chunks
from nanopd_lab.engine.queues import Queues
from nanopd_lab.kv import Allocator, blocks_for


class Scheduler(Queues):
    """Decides what each step computes.

    Args:
        allocator: the block pool; the scheduler is its only user
        block_size: tokens a block
        max_num_batched_tokens: tokens a step may hold
        max_num_seqs: sequences that may run at once
        max_model_len: longest prompt + output
        eos_token_ids: tokens that end a sequence unless the request says `ignore_eos`
        chunk_policy, victim_policy: see `nanopd_lab.engine.policies`
        block_manager: called with (allocator, block_size)
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
            block_manager(allocator, block_size),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
        )
        self.budget = max_num_batched_tokens
        self.chunk_policy = chunk_policy
        self.victim_policy = victim_policy
        self.num_steps = 0
        self.num_preemptions = 0
        self.serves = 0  # chunks planned; a sequence's last one orders decodes when the budget is short
        self.lockstepping = 0  # decodes that every step has without them running here; see `engine.lockstep`

    # ------------------------------------------------------------------ one step

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run before an earlier one is complete."""
        chunks: dict[Sequence, Chunk] = {}
        copies: dict[Sequence, list[BlockCopy]] = {}
        preempted: list[Sequence] = []

        decodes = [sequence for sequence in self.running if sequence.is_decoding]
        if decodes:
            self._place_decodes(decodes, chunks, copies, preempted)
        num_decodes = len(chunks) + self.lockstepping
        if self.waiting and not preempted:
            self._admit(self.budget - num_decodes, chunks)
        if len(self.running) > len(decodes) or preempted:
            self._place_prompts(num_decodes, set(decodes), chunks, copies, preempted)

        if not chunks:
            if self.waiting and self.running:
                # Beams that wait for a preempted sibling hold the blocks it needs.
                for sequence in [s for s in self.running if s.candidates is not None]:
                    self._preempt(sequence, preempted)
                return self.schedule() if preempted else None
            return None
        self.num_steps += 1
        self._advance(chunks.values())
        return StepPlan(
            self.num_steps,
            tuple(chunks.values()),
            tuple(chain.from_iterable(copies.values())) if copies else (),
            tuple(preempted),
        )

    def complete(self, plan: StepPlan, sampled: Seq[Seq[SampledToken]]) -> list[Sequence]:
        """Take in a step's result: `sampled[i]` holds `plan.chunks[i].samples` tokens.

        Returns the sequences that got a token or ended, new samples and beams included.
        """
        assert len(sampled) == len(plan.chunks)
        touched: list[Sequence] = []
        for place, chunk in enumerate(plan.chunks):
            tokens = sampled[place]
            sequence, end = chunk.sequence, chunk.start + chunk.count
            sequence.in_flight -= 1
            if sequence.finish_reason:  # since the step was planned
                continue
            sequence.tokens_computed += chunk.count
            if self.blocks.caching and sequence.num_computed >= end:  # not preempted since
                self.blocks.register(sequence, end)
            if not chunk.samples:
                continue
            assert len(tokens) == chunk.samples
            if tokens[0].error is not None:
                # One beam less would leave the others waiting for its candidates.
                ended = list(self._live[sequence.request.request_id]) if sequence.request.beam else [sequence]
                for each in ended:
                    self.finish(each, FinishReason.ERROR, error=tokens[0].error)
                touched.extend(ended)
            elif sequence.request.beam:
                sequence.candidates = tokens[0]
                touched.extend(self._advance_beams(sequence.request))
            elif chunk.samples == 1:
                self.append(sequence, tokens[0])
                touched.append(sequence)
            else:
                family = [sequence, *(self.fork(sequence, index) for index in range(1, chunk.samples))]
                for member, token in zip(family, tokens, strict=True):
                    self.append(member, token)
                touched.extend(family)
        return touched

    def roll_back(self, plan: StepPlan) -> None:
        """The step failed: queue its sequences again, to be computed anew. Nothing is lost or leaked.

        Of several, the one planned last is rolled back first; an earlier one may also complete as usual.
        """
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.in_flight -= 1
            if sequence.finished:
                continue
            if sequence.pending and len(sequence.tokens) == chunk.end + 1:
                sequence.tokens.pop()
                sequence.pending -= 1
            if sequence in self.running:  # not since a later step was rolled back
                self._preempt(sequence, [])

    # ------------------------------------------------------------------ filling a step

    def _place_decodes(
        self,
        decodes: list[Sequence],
        chunks: dict[Sequence, Chunk],
        copies: dict[Sequence, list[BlockCopy]],
        preempted: list[Sequence],
    ) -> None:
        if len(decodes) > self.budget:
            decodes.sort(key=lambda sequence: (sequence.last_served, sequence.priority))
        plenty = self.allocator.num_free >= len(decodes)  # a decode takes one block at most
        for sequence in decodes:
            if len(chunks) == self.budget:
                break
            if preempted and sequence not in self.running:  # lost its blocks to an older one in this loop
                continue
            if plenty or self._make_room(sequence, chunks, copies, preempted):
                self._place(sequence, 1, chunks, copies)

    def _place_prompts(
        self,
        num_decodes: int,
        decodes: set[Sequence],
        chunks: dict[Sequence, Chunk],
        copies: dict[Sequence, list[BlockCopy]],
        preempted: list[Sequence],
    ) -> None:
        """Divide the rest of the budget. A sequence admitted just now may lack one token only (the rest was cached): it
        is a chunk like others."""
        prefills, left = [], []
        for sequence in self.running:
            remaining = len(sequence.tokens) - sequence.num_computed
            if remaining > 0 and sequence not in decodes:
                prefills.append(sequence)
                left.append(remaining)
        counts = self.chunk_policy(num_decodes, left, self.budget)
        self._check_counts(counts, num_decodes, left)
        for place, sequence in enumerate(prefills):
            count = counts[place]
            if count == 0 or (preempted and sequence not in self.running):
                continue
            # Admission reserved room for every prompt, but decodes may have eaten into it since.
            if self._make_room(sequence, chunks, copies, preempted, count):
                self._place(sequence, count, chunks, copies)

    def _place(
        self,
        sequence: Sequence,
        count: int,
        chunks: dict[Sequence, Chunk],
        copies: dict[Sequence, list[BlockCopy]],
    ) -> None:
        """Plan the sequence's next `count` tokens, with blocks to write them to."""
        if made := self.blocks.extend(sequence, count):
            copies[sequence] = made
        start, samples = sequence.num_computed, 0
        if start + count == len(sequence.tokens):
            request = sequence.request
            first_token = start + count == sequence.prompt_len and not request.beam
            samples = request.params.n if first_token else 1
        chunks[sequence] = Chunk(sequence, start, count, samples)

    def _advance(self, chunks: Iterable[Chunk]) -> None:
        """The chunks are a plan: from here on their tokens count as computed."""
        for chunk in chunks:
            sequence, request = chunk.sequence, chunk.sequence.request
            sequence.num_computed = chunk.start + chunk.count
            sequence.in_flight += 1
            self.serves += 1
            sequence.last_served = self.serves
            more = len(sequence.tokens) + 1 - sequence.prompt_len < request.params.max_tokens
            if chunk.samples == 1 and more and not request.beam and not sequence.hand_off:
                sequence.tokens.append(PENDING)
                sequence.pending += 1

    def _make_room(
        self,
        sequence: Sequence,
        chunks: dict[Sequence, Chunk],
        copies: dict[Sequence, list[BlockCopy]],
        preempted: list[Sequence],
        count: int = 1,
    ) -> bool:
        """Preempt until `sequence` can have its blocks; False if it lost its own."""
        # Writing `count` tokens touches at most so many blocks: nothing to look at while there are plenty.
        if self.allocator.num_free > blocks_for(count, self.block_size):
            return True
        while self.blocks.missing(sequence, count) > self.allocator.num_free:
            victim = self.victim_policy(self.running)
            chunks.pop(victim, None)
            copies.pop(victim, None)
            self._preempt(victim, preempted)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence, preempted: list[Sequence]) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        sequence.preemptions += 1
        self.num_preemptions += 1
        self._insert(self.waiting, sequence)
        preempted.append(sequence)

    def _admit(self, room: int, placed: Container[Sequence]) -> None:
        """Move waiting sequences to running while the budget, the sequence cap and the pool allow.

        Those that are `placed` in this step have their blocks.
        """
        # A step serves at most `budget` sequences; admitting more would only make them wait inside.
        promised = self.promised
        cap = min(self.max_num_seqs, self.budget) - promised
        if room <= 0 or len(self.running) >= cap:
            return
        reserved = 0
        for sequence in self.running:
            remaining = sequence.remaining
            if remaining > 0 and sequence not in placed:
                reserved += self.blocks.missing(sequence, remaining)
            if remaining != 1 or not sequence.is_decoding:
                room -= remaining
        parked: list[Sequence] = []
        while self.waiting and room > 0:
            sequence = self.waiting[0]
            if sequence.in_flight:  # preempted while a step computes it: that step may still give it a token
                break
            if sequence.candidates is not None:  # a beam that waits for its siblings needs no blocks
                parked.append(self.waiting.popleft())
                continue
            width = sequence.request.params.n
            if width > 1 and sequence.output_len:
                width = 1
            if (self.running or promised) and len(self.running) + width > cap:
                break
            matched, evictable = self.blocks.cached(sequence) if self.blocks.caching else (0, 0)
            needed = blocks_for(len(sequence.tokens), self.block_size) - matched
            if needed + reserved > self.allocator.num_free - evictable:
                break
            self.waiting.popleft()
            if matched:
                self.blocks.attach_cached(sequence)
            self._insert(self.running, sequence)
            reserved += needed
            room -= sequence.remaining
        self.waiting.extendleft(reversed(parked))

    @property
    def promised(self) -> int:
        """Places among the running that are kept free."""
        return 0

    # ------------------------------------------------------------------ beams

    def _advance_beams(self, request: Request) -> list[Sequence]:
        """Once every live beam of the request has its candidates: keep the best, fork and drop the rest."""
        live = list(self._live[request.request_id])
        if any(sequence.candidates is None for sequence in live):
            return []
        group = self._beams[request.request_id]
        touched = list(live)
        children = group.select(live)
        next_index = max(sequence.index for sequence in live) + 1
        survivors: list[tuple[Sequence, SampledToken]] = []
        claimed: set[int] = set()
        for parent, token in children:
            if id(parent) in claimed:
                child = self.fork(parent, next_index)
                next_index += 1
                touched.append(child)
            else:
                child = parent
                claimed.add(id(parent))
            survivors.append((child, token))
        for sequence in live:
            sequence.candidates = None
            if id(sequence) not in claimed:
                self.finish(sequence, FinishReason.ABORT)
        for child, token in survivors:
            self.append(child, token)
        return touched

    def _check_counts(self, counts: Seq[int], num_decodes: int, left: Seq[int]) -> None:
        fits = len(counts) == len(left) and num_decodes + sum(counts) <= self.budget
        if fits:
            for place, most in enumerate(left):
                fits = fits and 0 <= counts[place] <= most
        if not fits:
            raise ValueError(
                f"the chunk policy returned {list(counts)} for prompts with {list(left)} tokens "
                f"left, {num_decodes} decodes and a budget of {self.budget}; each count must lie between 0 and what "
                "is left, and all together must fit the budget"
            )
