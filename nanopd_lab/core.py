"""The vocabulary: what a request is, what one engine step is, and what comes back.

Nothing here imports torch, reads a clock or starts a thread. The scheduler turns waiting and running
`Sequence`s into a `StepPlan`; the runner executes the plan and returns one `SampledToken` per sequence that
reached the end of its known tokens.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import MutableSequence
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

from nanopd_lab.errors import InvalidRequestError

MAX_LOGPROBS = 64
BlockTable = list[int] | range
"""A sequence's blocks, in order; a range where blocks are counted only, see `kv.counted`."""

_SEVERAL = (list, tuple, set, frozenset)
PENDING = -1  # stands for a token that a step under way is going to sample


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidRequestError(message)


def _check_integers(params: Any, *names: str, optional: Seq[str] = ()) -> None:
    """Integers of other types, such as NumPy's, become Python's."""
    for name in (*names, *optional):
        value = getattr(params, name)
        if type(value) is int or (value is None and name in optional):
            continue
        _check(
            hasattr(value, "__index__") and not isinstance(value, bool),
            f"{name} is {value!r}; it must be an integer{' or None' if name in optional else ''}",
        )
        object.__setattr__(params, name, value.__index__())


def _check_numbers(params: Any, *names: str) -> None:
    for name in names:
        value = getattr(params, name)
        _check(isinstance(value, Real), f"{name} is {value!r}; it must be a number")


@dataclass(frozen=True)
class SamplingParams:
    """How to sample the continuation of one prompt; names and defaults are vLLM's.

    Order of application: temperature, min_p, top_k, top_p. `temperature=0` is greedy. `logprobs=k` returns,
    for every token, the log-probabilities of the k most likely tokens and of the sampled one, taken from the
    model's raw distribution. A request with a `seed` gets the same tokens whatever else is in the batch.

    Raises:
        InvalidRequestError: a field is out of range; the message names it, the value and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = None
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    detokenize: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _check_integers(self, "n", "max_tokens", "min_tokens", "top_k", optional=("seed", "logprobs"))
        _check_numbers(self, "temperature", "top_p", "min_p")
        _check(self.n >= 1, f"n is {self.n}; it must be an integer of at least 1")
        _check(self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; it must be an integer of at least 1")
        _check(
            0 <= self.min_tokens <= self.max_tokens,
            f"min_tokens is {self.min_tokens}; it must lie between 0 and max_tokens ({self.max_tokens})",
        )
        _check(
            0.0 <= self.temperature < float("inf"),
            f"temperature is {self.temperature}; it must be 0 (greedy) or a finite positive number",
        )
        _check(0.0 < self.top_p <= 1.0, f"top_p is {self.top_p}; it must lie in (0, 1], 1 switches it off")
        _check(
            self.top_k >= -1,
            f"top_k is {self.top_k}; it must be a positive integer, or 0 or -1 for all tokens",
        )
        _check(0.0 <= self.min_p <= 1.0, f"min_p is {self.min_p}; it must lie in [0, 1], 0 switches it off")
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            f"logprobs is {self.logprobs}; it must lie between 0 and {MAX_LOGPROBS}, or be None",
        )
        _check(
            self.seed is None or -(2**63) <= self.seed < 2**63,
            f"seed is {self.seed}; it must be an integer that fits in 64 bits, or None",
        )
        _check(
            self.stop is None
            or isinstance(self.stop, str)
            or (isinstance(self.stop, _SEVERAL) and all(isinstance(text, str) for text in self.stop)),
            f"stop is {self.stop!r}; it must be a string, a list of strings, or None",
        )
        _check(all(self.stop_strings), "stop holds an empty string; it would end every output at once")
        _check(
            self.detokenize or not self.stop_strings,
            "stop strings need detokenize=True; use stop_token_ids to stop without text",
        )
        _check(
            self.stop_token_ids is None
            or (
                isinstance(self.stop_token_ids, _SEVERAL)
                and all(type(token) is int and token >= 0 for token in self.stop_token_ids)
            ),
            f"stop_token_ids is {self.stop_token_ids!r}; it must be a list of integers of at least 0, or None",
        )

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty when unset."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search by forking block tables; names and defaults are vLLM's.

    A finished beam scores `sum of log-probabilities / length ** length_penalty`; length counts prompt and
    output together, as in vLLM.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        _check_integers(self, "beam_width", "max_tokens")
        _check_numbers(self, "length_penalty")
        _check(
            1 <= self.beam_width <= MAX_LOGPROBS // 2,
            f"beam_width is {self.beam_width}; it must lie between 1 and {MAX_LOGPROBS // 2}",
        )
        _check(self.max_tokens >= 1, f"max_tokens is {self.max_tokens}; it must be an integer of at least 1")


class FinishReason(str, enum.Enum):
    """Why a sequence ended: at a stop token or string, at max_tokens, by the caller, or by an error."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"

    def __str__(self) -> str:
        return self.value


class Logprob(NamedTuple):
    """One token's log-probability and its rank in the distribution (1 is the most likely)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


class SampledToken(NamedTuple):
    """What the runner returns for one sequence: `logprob` of the token and, if asked for, the top ones."""

    token: int
    logprob: float = 0.0
    top_logprobs: dict[int, Logprob] | None = None
    error: str | None = None


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what to do with it. `arrival` is in seconds on the caller's clock."""

    request_id: str
    prompt_token_ids: Seq[int]
    params: SamplingParams
    arrival: float = 0.0
    prompt: str | None = None
    beam: BeamSearchParams | None = None
    serial: int = -1  # order of admission, given by the scheduler; lower is served first


@dataclass(eq=False, slots=True)
class Sequence:
    """One sample of a request: its tokens, its blocks, and how far its KV has been computed.

    The KV of tokens `[0, num_computed)` is in the cache, or will be once the steps planned so far have run. A
    sequence whose every token is computed waits for what those steps sample. Where the next step can be planned
    without knowing that token, `PENDING` stands in for it at the end of `tokens`; `pending` counts them.
    """

    request: Request
    index: int = 0
    tokens: MutableSequence[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: BlockTable = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_registered: int = 0  # leading full blocks already offered to the prefix cache
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    last_served: int = -1
    pending: int = 0
    in_flight: int = 0  # steps that compute some of it, planned and not complete
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    candidates: SampledToken | None = None  # beam search: sampled, waiting for the sibling beams
    hand_off: bool = False  # another worker goes on with it once it has sampled a token
    # Accounting: every token's KV was computed here, came from the prefix cache or from another worker.
    tokens_computed: int = 0
    tokens_cached: int = 0
    tokens_received: int = 0
    preemptions: int = 0
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        prompt = self.request.prompt_token_ids
        self.prompt_len = len(prompt)
        if not self.tokens:  # simulated prompts are arrays, which are copied much faster
            self.tokens = prompt[:] if isinstance(prompt, array) else list(prompt)

    def append_same(self, token: int, count: int) -> None:
        """Append `token` so many times, which a simulation does."""
        one: Any = self.tokens[:1]  # a list or an array, as `tokens` is
        one[0] = token
        self.tokens.extend(one * count)

    @property
    def known_len(self) -> int:
        """Tokens that are known; the pending ones behind them are not counted."""
        return len(self.tokens) - self.pending

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.pending - self.prompt_len

    @property
    def output_token_ids(self) -> list[int]:
        return list(self.tokens[self.prompt_len : self.known_len])

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """One token to go, and it is an output token, known or pending: a decode step."""
        length = len(self.tokens)
        return length - self.num_computed == 1 and length > self.prompt_len

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def priority(self) -> tuple[int, int]:
        """Lower is served first and preempted last: order of admission, then sample index."""
        return (self.request.serial, self.index)

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id}/{self.index}, {self.num_computed}/{len(self.tokens)} tokens, "
            f"{len(self.blocks)} blocks{', ' + str(self.finish_reason) if self.finished else ''})"
        )


@dataclass(
    eq=False, slots=True
)  # frozen in spirit: that makes one three times as dear, and a step makes hundreds
class Chunk:
    """Tokens `[start, start + count)` of one sequence, computed in one step.

    `samples` is how many tokens to draw behind the last one: 0 in the middle of a prompt, 1 in a decode
    step, n when a prompt with n samples completes.
    """

    sequence: Sequence
    start: int
    count: int
    samples: int

    @property
    def end(self) -> int:
        return self.start + self.count


class Route(NamedTuple):
    """Who serves a request: `prefill` computes its prompt, `decode` its output. Collocated if they are one worker."""

    prefill: str
    decode: str

    @property
    def collocated(self) -> bool:
        return self.prefill == self.decode

    def __str__(self) -> str:
        return self.prefill if self.collocated else f"{self.prefill}→{self.decode}"


@dataclass(frozen=True)
class BlockCopy:
    """Copy block `source` to block `target` (all layers) before the step: copy-on-write."""

    source: int
    target: int


@dataclass(eq=False)
class StepPlan:
    """One engine step: decode tokens first, then prefill chunks, all in one flat batch."""

    step: int
    chunks: tuple[Chunk, ...]
    copies: tuple[BlockCopy, ...] = ()
    preempted: tuple[Sequence, ...] = ()

    @cached_property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    @property
    def num_decodes(self) -> int:
        """Leading chunks that are decode steps."""
        return sum(
            1 for chunk in self.chunks if chunk.count == 1 and chunk.start >= chunk.sequence.prompt_len
        )
