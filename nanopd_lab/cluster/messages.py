"""What controller and workers tell each other. Small values that can be sent to another process; KV never is.

    controller ──Begin, Expect, Published, Release, Cancel, Extend──► worker
    worker ──Hello, Beat, Tokens, Published, Received, Extend, Failed, Ended──► controller

Every try at serving one sample of a request has a `key` of its own, so that what comes late from an earlier try is
recognised and dropped. Workers don't talk to each other: what the source publishes goes to the target through the
controller, which so knows of every step. Times are seconds: a worker reports them on its own clock (`time.monotonic`),
and the launcher puts them on the controller's, see `clocks`. Nothing that is sent to a worker holds a time.
What is sent often is frozen in spirit only, which makes it three times as cheap to make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from nanopd_lab.core import FinishReason, SampledToken, SamplingParams
from nanopd_lab.transfer import PoolAddress


@dataclass(slots=True)
class Work:
    """One sample of a request, as far as it has come: what a worker needs to go on with it.

    index: which sample; outputs: tokens that the caller has already
    """

    prompt: Sequence[int]
    params: SamplingParams
    index: int = 0
    outputs: tuple[int, ...] = ()

    @property
    def num_known(self) -> int:
        """Tokens whose KV the next one needs."""
        return len(self.prompt) + len(self.outputs)


# ---------------------------------------------------------------------- to a worker


@dataclass(slots=True)
class Begin:
    """Compute this; with `hand_off` publish its blocks, and hold them once its next token is sampled."""

    key: str
    work: Work
    hand_off: bool


@dataclass(slots=True)
class Expect:
    """`source` computes this; reserve blocks and pull what it publishes."""

    key: str
    work: Work
    source: str


@dataclass(slots=True)
class Published:
    """The source has computed these blocks; each message repeats those before.

    blocks: of the source's pool, whole ones, and the last one too when `token` is there
    generations: of each, see `transfer.base`
    token: sampled behind the last position; all is computed then
    """

    key: str
    blocks: Sequence[int]
    generations: Sequence[int]
    num_tokens: int
    token: SampledToken | None = None


@dataclass(slots=True)
class Release:
    """All was pulled: the source may give the blocks to others."""

    key: str


@dataclass(slots=True)
class Cancel:
    """Nobody wants it any more."""

    key: str


@dataclass(slots=True)
class Extend:
    """The target is alive and still wants the blocks: renew their lease. Target to source, through the controller."""

    key: str


ToWorker = Begin | Expect | Published | Release | Cancel | Extend

# ---------------------------------------------------------------------- from a worker


@dataclass(frozen=True)
class Capacity:
    """What a worker can hold."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_bytes: int = 0
    device: str = ""

    @cached_property
    def longest(self) -> int:
        """Tokens that a sequence may have."""
        return min(self.max_model_len, self.num_blocks * self.block_size)


@dataclass(frozen=True)
class Hello:
    """The worker is ready. `address` is its pool's."""

    capacity: Capacity
    address: PoolAddress | None = None


@dataclass(frozen=True)
class Beat:
    """The worker's loop is alive; what it holds now."""

    running: int
    waiting: int
    expected: int
    held: int
    blocks_free: int
    steps: int
    prefill_tokens: int  # of queued and running prompts, still to be computed


@dataclass(slots=True)
class Tokens:
    """New tokens of one sample; `position` is the first one's place in its output."""

    key: str
    position: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(slots=True)
class Received:
    """The target has all blocks and goes on: the source may release its own."""

    key: str


@dataclass(slots=True)
class Failed:
    """This worker gives the try up. `retry` says whether another worker may do better."""

    key: str
    error: str
    retry: bool = True


@dataclass(slots=True)
class Usage:
    """What one worker did for one try. Tokens are counted by where their KV came from, bytes as pulled.

    computed: here, again after a preemption; cached: found in the prefix cache; received: pulled
    first_cached: of `cached`, what was found when the work came in
    scheduled, sampled: when its first chunk was planned, and its first token here was known
    reserved: when it got blocks to receive into; adopted: when all had arrived
    pulls: (begin, end) of every pull
    """

    computed: int = 0
    cached: int = 0
    received: int = 0
    first_cached: int = 0
    preemptions: int = 0
    received_bytes: int = 0
    scheduled: float | None = None
    sampled: float | None = None
    reserved: float | None = None
    adopted: float | None = None
    pulls: tuple[tuple[float, float], ...] = ()

    def shifted(self, by_s: float) -> Usage:
        """The same on a clock that is so many seconds ahead."""

        def shift(time_s: float | None) -> float | None:
            return None if time_s is None else time_s + by_s

        return replace(
            self,
            scheduled=shift(self.scheduled),
            sampled=shift(self.sampled),
            reserved=shift(self.reserved),
            adopted=shift(self.adopted),
            pulls=tuple((begin + by_s, end + by_s) for begin, end in self.pulls),
        )


@dataclass(slots=True)
class Ended:
    """The worker holds nothing of this try any more; its part of the accounts."""

    key: str
    usage: Usage = field(default_factory=Usage)


FromWorker = Hello | Beat | Tokens | Published | Received | Extend | Failed | Ended
