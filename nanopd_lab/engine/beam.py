"""Which beams survive a step. Pure bookkeeping; the scheduler forks and drops the block tables."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from nanopd_lab.core import BeamSearchParams, Logprob, SampledToken, Sequence


@dataclass(frozen=True)
class FinishedBeam:
    """A beam that reached a stop token."""

    tokens: tuple[int, ...]  # prompt and output, the stop token included
    cumulative_logprob: float
    logprobs: tuple[dict[int, Logprob], ...]


class BeamGroup:
    """The finished beams of one request, and the choice of the next live ones.

    Each live beam offers its `2 * beam_width` most likely continuations, as in vLLM's `beam_search`: even if
    half of them end, `beam_width` live ones remain.
    """

    def __init__(self, params: BeamSearchParams, eos_token_ids: frozenset[int]) -> None:
        self.params = params
        self.eos_token_ids = eos_token_ids
        self.finished: list[FinishedBeam] = []

    def select(self, live: Seq[Sequence]) -> list[tuple[Sequence, SampledToken]]:
        """The `beam_width` best continuations (parent, token), best first; beams that end are set aside."""
        offers: list[tuple[float, Sequence, int, Logprob, dict[int, Logprob]]] = []
        for sequence in live:
            assert sequence.candidates is not None
            top = sequence.candidates.top_logprobs
            assert top is not None
            ranked = sorted(top.items(), key=lambda item: item[1].rank)[: 2 * self.params.beam_width]
            for token, entry in ranked:
                score = sequence.cumulative_logprob + entry.logprob
                if token in self.eos_token_ids:
                    self.finished.append(
                        FinishedBeam((*sequence.tokens, token), score, (*sequence.logprobs, {token: entry}))
                    )
                else:
                    offers.append((score, sequence, token, entry, {token: entry}))
        offers.sort(key=lambda offer: offer[0], reverse=True)
        return [
            (parent, SampledToken(token, entry.logprob, top))
            for _, parent, token, entry, top in offers[: self.params.beam_width]
        ]

    def score(self, tokens: Seq[int], cumulative_logprob: float) -> float:
        """`cumulative_logprob / length ** length_penalty`; a final stop token does not count."""
        length = len(tokens) - (tokens[-1] in self.eos_token_ids)
        return cumulative_logprob / length**self.params.length_penalty
