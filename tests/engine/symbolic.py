"""A model without numbers: the scheduler's real work, checked exactly and in microseconds.

The "KV" of position i is a digest of the tokens up to i; the "logits" are that digest. A step writes the
digests of its tokens to their slots, and then reads back every position of its context: if any slot holds
something else (a block shared and overwritten, re-used too early, not copied, not recomputed), it says so.
"""

from __future__ import annotations

from nanopd_lab.core import PENDING, Chunk, Logprob, SampledToken, SamplingParams, Sequence, StepPlan
from nanopd_lab.kv import slots

VOCAB = 50
EOS = 0
PRIME = 2**31 - 1  # so many scores that beams do not tie


def digest(tokens: list[int], end: int) -> int:
    return hash(tuple(tokens[:end]))


def next_token(tokens: list[int], sample: int) -> int:
    return hash((tuple(tokens), sample)) % VOCAB


def rollout(prompt: list[int], params: SamplingParams, sample: int) -> list[int]:
    """What a request must produce, computed without any engine."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens, sample))
        out = tokens[len(prompt) :]
        if (tokens[-1] == EOS and not params.ignore_eos) or len(out) == params.max_tokens:
            return out


def top_logprobs(tokens: list[int], width: int) -> dict[int, Logprob]:
    """Distinct, deterministic log-probabilities for beam search."""
    scored = sorted(
        ((-(hash((tuple(tokens), t)) % PRIME) / PRIME - 0.1, t) for t in range(VOCAB)), reverse=True
    )
    return {token: Logprob(score, rank + 1) for rank, (score, token) in enumerate(scored[:width])}


class SymbolicRunner:
    """Executes plans on the digest cache, in the order in which they were made.

    Like a GPU it knows the tokens that it sampled itself: it fills in those that a plan has as `PENDING`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cache: list[int | None] = [None] * (num_blocks * block_size)
        self.sampled: dict[int, int] = {}  # by id(sequence): what the latest plan drew for it

    def _tokens(self, chunk: Chunk) -> list[int]:
        tokens = chunk.sequence.tokens[: chunk.end]
        if tokens[-1] == PENDING:
            tokens[-1] = self.sampled[id(chunk.sequence)]
        assert PENDING not in tokens, f"{chunk.sequence}: only the token of the step before may be unknown"
        return tokens

    def execute(self, plan: StepPlan) -> list[list[SampledToken]]:
        size = self.block_size
        before = list(self.cache)
        for copy in plan.copies:
            self.cache[copy.target * size : (copy.target + 1) * size] = before[
                copy.source * size : (copy.source + 1) * size
            ]
        written: set[int] = set()
        for chunk in plan.chunks:
            for position, slot in enumerate(
                self._slots(chunk.sequence, chunk.start, chunk.count), chunk.start
            ):
                assert slot not in written, f"two sequences write slot {slot} in one step"
                written.add(slot)
                self.cache[slot] = digest(self._tokens(chunk), position + 1)
        results = []
        drawn: dict[int, int] = {}
        for chunk in plan.chunks:
            tokens = self._tokens(chunk)
            for position, slot in enumerate(self._slots(chunk.sequence, 0, chunk.end)):
                assert self.cache[slot] == digest(tokens, position + 1), (
                    f"{chunk.sequence} reads a foreign slot at position {position}"
                )
            results.append([self._draw(chunk.sequence, tokens, offset) for offset in range(chunk.samples)])
            if chunk.samples:
                drawn[id(chunk.sequence)] = results[-1][0].token
        self.sampled = drawn
        return results

    def _slots(self, sequence: Sequence, start: int, count: int) -> list[int]:
        return slots(sequence.blocks, start, count, self.block_size)

    def _draw(self, sequence: Sequence, tokens: list[int], offset: int) -> SampledToken:
        beam = sequence.request.beam
        if beam:
            return SampledToken(0, 0.0, top_logprobs(tokens, 2 * beam.beam_width))
        return SampledToken(next_token(tokens, sequence.index + offset))
