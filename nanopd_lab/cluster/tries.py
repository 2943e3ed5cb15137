"""What a worker knows of each try that it takes part in, what it tells of it, and how it ends.

Each try ends with `Ended`, when its last block is given back. Blocks that a pull may still be writing to are not given
back before the transport says how the pull ended.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from nanopd_lab.cluster.lease import Lease
from nanopd_lab.cluster.messages import Ended, Failed, FromWorker, Published, Tokens, Usage
from nanopd_lab.cluster.positions import Positions
from nanopd_lab.core import FinishReason, SampledToken, Sequence
from nanopd_lab.engine.handover import HandoverScheduler


@dataclass(eq=False, slots=True)
class Try:
    """One try, seen from one worker."""

    key: str
    sequence: Sequence
    source: str | None = None  # set on the target
    sent: int = 0  # output tokens reported
    published: tuple[int, int] = (0, 0)  # preemptions so far, blocks
    lease: Lease | None = None  # on the source, once all is computed
    # On the target: what the source has, which blocks are here, which are on their way.
    offer: Published | None = None
    arrived: Positions = field(default_factory=Positions)
    under_way: dict[int, range | tuple[int, ...]] = field(default_factory=dict)  # positions by pull
    spent: Published | None = None  # an offer of which a block was gone already
    waits_since: float = 0.0
    renew_at: float = 0.0
    dropped: bool = False  # to be given back as soon as no pull writes any more
    strikes: int = 0
    usage: Usage = field(default_factory=Usage)


class Tries:
    """The tries of one worker; see the module.

    Args:
        name: this worker's
        scheduler: its own; nobody else adds to it
        stream: tell of tokens as they come; without it, of a request's first one and then, at the end, of the rest
    """

    def __init__(self, name: str, scheduler: HandoverScheduler, stream: bool) -> None:
        self.name = name
        self.scheduler = scheduler
        self.stream = stream
        self.outbox: list[FromWorker] = []
        self.cancelled_pulls: list[int] = []  # to be cancelled
        self.now = 0.0
        self._tries: dict[str, Try] = {}
        self.timed: dict[str, Try] = {}  # those of which something may come due
        self._unsampled: set[Sequence] = set()  # have no `usage.sampled` yet
        self._freed_at = float("-inf")  # when somebody last gave blocks and a place back
        self._offered: set[str] = set()  # keys of which the source has published something

    @property
    def idle(self) -> bool:
        """True if it holds nothing for anybody."""
        return not self._tries

    # ------------------------------------------------------------------ what is told

    def _note_scheduled(self, sequence: Sequence, start: int) -> None:
        each = self._tries[sequence.request.request_id]
        if each.usage.scheduled is None:
            cached = start if each.usage.reserved is None else each.usage.first_cached
            each.usage.scheduled, each.usage.first_cached = self.now, cached

    def _report(self, each: Try) -> None:
        """Send the tokens that the controller doesn't have yet."""
        sequence, usage, finished = each.sequence, each.usage, each.sequence.finish_reason is not None
        if usage.sampled is not None:
            if not self.stream and not finished:
                return
        else:
            self._note_sampled(each, self.now)
            if not self.stream and not finished and usage.adopted is not None:
                return
        new = sequence.tokens[sequence.prompt_len + each.sent : sequence.known_len]
        if new or finished:
            self.outbox.append(
                Tokens(
                    each.key,
                    each.sent,
                    self._sampled(sequence, new),
                    sequence.finish_reason,
                    sequence.stop_reason,
                    sequence.error,
                )
            )
            each.sent += len(new)
        if finished:
            self._forget(each)

    def _note_sampled(self, each: Try, now: float) -> None:
        self._unsampled.discard(each.sequence)
        each.usage.sampled = now

    def _sampled(self, sequence: Sequence, new: Seq[int]) -> tuple[SampledToken, ...]:
        """The newest tokens as they were sampled."""
        tops = sequence.logprobs[len(sequence.logprobs) - len(new) :] if sequence.logprobs else []
        return tuple(
            SampledToken(token, tops[i][token].logprob if tops else 0.0, tops[i] if tops else None)
            for i, token in enumerate(new)
        )

    def report_all(self) -> None:
        """Send what was held back, of all sequences, when `stream` is off."""
        self.stream = True
        for each in list(self._tries.values()):
            if not each.dropped and each.sequence.output_len > each.sent:
                self._report(each)
        self.stream = False

    # ------------------------------------------------------------------ ends

    def _fail(self, each: Try, error: str) -> None:
        self.outbox.append(Failed(each.key, error))
        self._drop(each)

    def _drop(self, each: Try) -> None:
        """Give all up, as soon as no pull writes to its blocks."""
        each.dropped = True
        each.lease = None
        self.cancelled_pulls += each.under_way
        if not each.under_way:
            self._finish(each)

    def _finish(self, each: Try) -> None:
        self.scheduler.finish(each.sequence, FinishReason.ABORT)
        self._forget(each)

    def _forget(self, each: Try) -> None:
        sequence, usage = each.sequence, each.usage
        self._freed_at = self.now
        usage.computed = sequence.tokens_computed
        usage.cached = sequence.tokens_cached
        usage.received = sequence.tokens_received
        usage.preemptions = sequence.preemptions
        del self._tries[each.key]
        self.timed.pop(each.key, None)
        self._unsampled.discard(sequence)
        self._offered.discard(each.key)
        self.outbox.append(Ended(each.key, usage))
