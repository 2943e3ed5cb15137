"""The requests of a scheduler: how they come, what samples of them there are, which wait and which run, how they end.

Of each request the unfinished sequences are known, each of which waits or runs. Both queues are in order of priority.
What a step computes is the scheduler's to say.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import MutableSequence

from nanopd_lab.core import FinishReason, Request, SampledToken, Sequence
from nanopd_lab.engine.beam import BeamGroup
from nanopd_lab.engine.block_manager import BlockManager
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.kv import Allocator, blocks_for


class Queues:
    """See the module.

    Args:
        allocator: the block pool
        blocks: gives blocks of it to sequences, and takes them back
        others: as of `Scheduler`
    """

    def __init__(
        self,
        allocator: Allocator,
        blocks: BlockManager,
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.allocator = allocator
        self.blocks = blocks
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.eos_token_ids = eos_token_ids
        self.waiting: deque[Sequence] = deque()  # by priority
        self.running: list[Sequence] = []  # by priority
        self._live: dict[str, list[Sequence]] = {}  # unfinished sequences of each request
        self._beams: dict[str, BeamGroup] = {}
        self._next_serial = 0

    # ------------------------------------------------------------------ requests in and out

    def validate(self, request: Request) -> None:
        """Refuse what could never finish.

        Raises:
            InvalidRequestError: empty prompt, too long for the model or the pool, too many samples.
        """
        prompt = len(request.prompt_token_ids)
        total = prompt + request.params.max_tokens
        width = request.beam.beam_width if request.beam else request.params.n
        if prompt == 0:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if total > self.max_model_len:
            raise InvalidRequestError(
                f"prompt ({prompt} tokens) + max_tokens ({request.params.max_tokens}) = {total} tokens, over the "
                f"limit max_model_len = {self.max_model_len}; shorten the prompt or lower max_tokens"
            )
        blocks = blocks_for(total, self.block_size)
        if blocks > self.allocator.num_blocks:
            raise InvalidRequestError(
                f"prompt ({prompt} tokens) + max_tokens ({request.params.max_tokens}) needs {blocks} blocks of "
                f"{self.block_size} tokens, the KV pool has {self.allocator.num_blocks}; shorten the prompt, lower "
                "max_tokens or raise kv_cache_memory_bytes"
            )
        if width > self.max_num_seqs:
            raise InvalidRequestError(
                f"{width} samples or beams of one prompt, over the limit max_num_seqs = {self.max_num_seqs}"
            )
        if request.request_id in self._live:
            raise InvalidRequestError(f"request id {request.request_id!r} is already in use")

    def add(self, request: Request) -> Sequence:
        """Queue a request; returns its first sequence (further samples are forked off it later)."""
        sequence = self._enter(request)
        self.waiting.append(sequence)
        return sequence

    def _enter(self, request: Request) -> Sequence:
        self.validate(request)
        request.serial = self._next_serial
        self._next_serial += 1
        sequence = Sequence(request)
        self._live[request.request_id] = [sequence]
        if request.beam:
            self._beams[request.request_id] = BeamGroup(request.beam, self._ends_at(request))
        return sequence

    def abort(self, request_id: str) -> list[Sequence]:
        """End every unfinished sequence of a request; unknown or finished requests are ignored."""
        ended = list(self._live.get(request_id, ()))
        for sequence in ended:
            self.finish(sequence, FinishReason.ABORT)
        return ended

    def finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> None:
        """End one sequence now (also for stop strings, which only the engine can see)."""
        if sequence.finish_reason:
            return
        sequence.finish_reason, sequence.stop_reason, sequence.error = reason, stop_reason, error
        sequence.candidates = None
        if sequence.pending:
            del sequence.tokens[sequence.known_len :]
            sequence.pending = 0
        self._dequeue(sequence)
        self.blocks.release(sequence)
        request_id = sequence.request.request_id
        siblings = self._live[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[request_id]
            self._beams.pop(request_id, None)

    def _dequeue(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def beam_group(self, request_id: str) -> BeamGroup | None:
        """The beams of an unfinished beam-search request; keep it, it outlives the request here."""
        return self._beams.get(request_id)

    @property
    def has_unfinished(self) -> bool:
        """True while any request has something left to do."""
        return bool(self._live)

    # ------------------------------------------------------------------ tokens and samples

    def append(self, sequence: Sequence, sampled: SampledToken) -> None:
        """Append a token and end the sequence if it is a stop token or the last one allowed."""
        params, token = sequence.request.params, sampled.token
        if sequence.pending:
            sequence.tokens[-sequence.pending] = token
            sequence.pending -= 1
        else:
            sequence.tokens.append(token)
        sequence.cumulative_logprob += sampled.logprob
        if sampled.top_logprobs is not None:
            sequence.logprobs.append(sampled.top_logprobs)
        length = len(sequence.tokens) - sequence.pending - sequence.prompt_len
        if length >= params.min_tokens:
            if params.stop_token_ids and token in params.stop_token_ids:
                self.finish(sequence, FinishReason.STOP, token)
                return
            if not params.ignore_eos and token in self.eos_token_ids:
                self.finish(sequence, FinishReason.STOP)
                return
        if length >= params.max_tokens:
            self.finish(sequence, FinishReason.LENGTH)

    def fork(self, parent: Sequence, index: int) -> Sequence:
        """A second sample or beam that shares all of its parent's blocks."""
        assert not parent.pending
        child = Sequence(
            request=parent.request,
            index=index,
            tokens=list(parent.tokens),
            num_computed=parent.num_computed,
            blocks=self.blocks.fork(parent),
            block_hashes=list(parent.block_hashes),
            num_registered=parent.num_registered,
            logprobs=list(parent.logprobs),
            cumulative_logprob=parent.cumulative_logprob,
            last_served=parent.last_served,
        )
        self._live[parent.request.request_id].append(child)
        queue = self.running if parent in self.running else self.waiting
        self._insert(queue, child)
        return child

    def _ends_at(self, request: Request) -> frozenset[int]:
        assert request.beam is not None
        return frozenset() if request.beam.ignore_eos else self.eos_token_ids

    # ------------------------------------------------------------------ the queues

    @property
    def num_running(self) -> int:
        """Sequences that hold a place."""
        return len(self.running)

    @staticmethod
    def _insert(queue: MutableSequence[Sequence], sequence: Sequence) -> None:
        """Where its priority puts it, which is mostly at the end."""
        if queue and queue[-1].priority > sequence.priority:
            bisect.insort(queue, sequence, key=_priority)
        else:
            queue.append(sequence)

    def _queued(self) -> list[Sequence]:
        return [*self.waiting, *self.running]

    def check_integrity(self) -> None:
        """Raise AssertionError if a block is owned by nobody in particular or written by two."""
        live = [sequence for family in self._live.values() for sequence in family]
        queued = self._queued()
        assert len(queued) == len(live), "a sequence is lost or queued twice"
        assert {id(s) for s in queued} == {id(s) for s in live}, "a sequence is lost or queued twice"
        for waiting in self.waiting:
            assert not waiting.blocks, f"{waiting} waits but holds blocks"
        self.blocks.check_integrity(live)


def _priority(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.serial, sequence.index
