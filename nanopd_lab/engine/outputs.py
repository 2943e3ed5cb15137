"""What comes back for a request; shapes follow vLLM's `RequestOutput`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from nanopd_lab.core import Logprob


@dataclass
class RequestMetrics:
    """When things happened to a request (seconds on the engine's clock), and where its KV came from.

    Token counts are over all samples: `num_computed_tokens` were computed here (again, after a preemption),
    `num_cached_tokens` came from the prefix cache.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def e2e(self) -> float | None:
        """Time from arrival to the last token, seconds."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time

    def tpot(self, output_tokens: int) -> float | None:
        """Time per output token after the first, seconds; None for fewer than two tokens."""
        if self.finished_time is None or self.first_token_time is None or output_tokens < 2:
            return None
        return (self.finished_time - self.first_token_time) / (output_tokens - 1)


@dataclass
class CompletionOutput:
    """One sample. `text` stops before a stop string; `token_ids` holds every token that was drawn.

    token_times: of a cluster: when each came, in seconds on its clock
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    token_times: Seq[float] = field(default=(), compare=False)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


def spelled(logprobs: Seq[dict[int, Logprob]], tokenizer: Any) -> list[dict[int, Logprob]]:
    """The same with each token's text; without a tokenizer it has none."""
    return [
        {
            token: entry._replace(decoded_token=None if tokenizer is None else tokenizer.decode([token]))
            for token, entry in top.items()
        }
        for top in logprobs
    ]


@dataclass
class RequestOutput:
    """A request so far: `outputs` has one entry a sample, `finished` says whether all have ended."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Seq[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics

    @property
    def num_cached_tokens(self) -> int:
        return self.metrics.num_cached_tokens


@dataclass
class BeamSearchSequence:
    """One beam: prompt and output tokens, their text, and the output's log-probability."""

    tokens: list[int]
    text: str
    cum_logprob: float
    logprobs: list[dict[int, Logprob]]


@dataclass
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]
