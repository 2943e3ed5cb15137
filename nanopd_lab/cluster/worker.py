"""A worker without its model: what it does with messages, pulls and finished steps. Sans-IO.

No clock, no thread, no torch: messages, results of pulls and of steps go in with the time; messages and pulls to
start come out. `cluster.host` drives it with a real engine, the simulator with a cost model.

Whatever happens, each try ends here with `Ended`, when its last block is given back. Blocks that a pull may still be
writing to are not given back before the transport says how the pull ended.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

from nanopd_lab.cluster.lease import Lease, LeaseTerms
from nanopd_lab.cluster.messages import (
    Beat,
    Begin,
    Cancel,
    Ended,
    Expect,
    Extend,
    Failed,
    FromWorker,
    Published,
    Received,
    Release,
    Tokens,
    ToWorker,
    Usage,
)
from nanopd_lab.cluster.positions import Positions, compact
from nanopd_lab.core import FinishReason, Request, SampledToken, Sequence, StepPlan
from nanopd_lab.engine.decode_run import advance, equal_steps
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.kv import blocks_for
from nanopd_lab.transfer import Pull, PullResult, PullStatus

MAX_STRIKES = 2  # steps that may fail under a sequence before it is given up


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


def missing_blocks(offered: int, arrived: Container[int], under_way: Container[int]) -> list[int]:
    """Positions in the block table that can be pulled now: the source offers the first `offered` of them, and what is
    here or on its way need not be asked for again. In ascending order."""
    return [position for position in range(offered) if position not in arrived and position not in under_way]


def _picked(values: Seq[int], positions: range | tuple[int, ...]) -> Seq[int]:
    """The values at these positions, which mostly follow each other: a slice is quicker."""
    if isinstance(positions, range):
        return values[positions.start : positions.stop]
    return [values[position] for position in positions]


class WorkerCore:
    """See the module. A subclass may replace `missing`, as a function with the same meaning.

    Args:
        name: this worker's
        scheduler: its own; nobody else adds to it
        terms: of leases
        generation: of a block of the own pool; None: the allocator's
        lease: makes a `Lease`
        stream: tell of tokens as they come; without it, of a request's first one and then, at the end, of the rest
    """

    missing = staticmethod(missing_blocks)

    def __init__(
        self,
        name: str,
        scheduler: HandoverScheduler,
        terms: LeaseTerms | None = None,
        generation: Callable[[int], int] | None = None,
        lease: Callable[[LeaseTerms, float], Lease] = Lease,
        stream: bool = True,
    ) -> None:
        self.name = name
        self.scheduler = scheduler
        self.terms = terms or LeaseTerms()
        self.generation = generation or scheduler.allocator.generation  # type: ignore[attr-defined]
        self.lease = lease
        self.stream = stream
        self.outbox: list[FromWorker] = []
        self.pulls: list[Pull] = []  # to be started
        self.cancelled_pulls: list[int] = []  # to be cancelled
        self.now = 0.0
        self._tries: dict[str, Try] = {}
        self.timed: dict[str, Try] = {}  # those for which `tick` may have something to do
        self._unsampled: set[Sequence] = set()  # have no `usage.sampled` yet
        self._freed_at = float("-inf")  # when somebody last gave blocks and a place back
        self._offered: set[str] = set()  # keys of which the source has published something
        self._pulling: dict[int, tuple[Try, Published]] = {}
        self._next_pull = 0

    # ------------------------------------------------------------------ messages

    def handle(self, message: ToWorker, now: float) -> None:
        """Take in one message."""
        self.now = now
        if isinstance(message, (Begin, Expect)):
            self._take_on(message)
            return
        each = self._tries.get(message.key)
        if each is None or each.dropped:
            return  # it has ended here; the controller knows, or will
        if isinstance(message, Published):
            each.offer, each.waits_since = message, now
            self._offered.add(each.key)
            self._pull(each)
        elif isinstance(message, (Release, Cancel)):
            self._drop(each)
        elif isinstance(message, Extend) and each.lease is not None:
            each.lease.renew(now)

    def _take_on(self, message: Begin | Expect) -> None:
        work = message.work
        params = work.params if work.params.n == 1 else replace(work.params, n=1)
        request = Request(message.key, work.prompt, params, arrival=self.now)
        try:
            if isinstance(message, Begin):
                sequence = self.scheduler.begin(request, work.index, work.outputs, message.hand_off)
                each = Try(message.key, sequence)
            else:
                sequence = self.scheduler.expect(request, work.index, work.outputs)
                each = Try(message.key, sequence, message.source, waits_since=self.now)
                each.renew_at = self.now + self.terms.renewal
        except InvalidRequestError as error:
            self.outbox += [Failed(message.key, str(error), retry=False), Ended(message.key)]
            return
        each.sent = len(work.outputs)
        self._unsampled.add(each.sequence)
        self._tries[message.key] = each
        if each.source is not None:
            self.timed[message.key] = each

    # ------------------------------------------------------------------ steps: the planner of a `StepLoop`

    def schedule(self) -> StepPlan | None:
        """The next step; reserves room for what is expected first."""
        if self.scheduler.expected:
            self._reserve()
        plan = self.scheduler.schedule()
        if plan is not None and self._unsampled:
            for chunk in plan.chunks:
                if chunk.sequence in self._unsampled:
                    self._note_scheduled(chunk.sequence, chunk.start)
        return plan

    def start_run(self, most: int) -> int:
        """As `schedule`, for several steps at once: how many equal decode steps can be done from here, at most `most`.

        Nothing is planned yet: `finish_run` does those of them that were done, which may be fewer if something came in
        between. 0: use `schedule`. See `engine.decode_run`.
        """
        if self.scheduler.expected:
            self._reserve()
        steps = equal_steps(self.scheduler, most)
        if not steps or self._unsampled.isdisjoint(self.scheduler.running):
            return steps
        for sequence in self._unsampled.intersection(self.scheduler.running):
            self._note_scheduled(sequence, sequence.num_computed)
        return 1  # the time of that token is asked for

    def finish_run(self, steps: int, token: SampledToken) -> None:
        """`steps` decode steps were done that `start_run` has allowed; every one gave every sequence this token."""
        told = list(self.scheduler.running)
        ended = advance(self.scheduler, steps, token)
        if not self.stream and self._unsampled.isdisjoint(told):
            told = ended
        for sequence in told:
            self._report(self._tries[sequence.request.request_id])

    def _note_scheduled(self, sequence: Sequence, start: int) -> None:
        each = self._tries[sequence.request.request_id]
        if each.usage.scheduled is None:
            cached = start if each.usage.reserved is None else each.usage.first_cached
            each.usage.scheduled, each.usage.first_cached = self.now, cached

    def _reserve(self) -> None:
        for sequence in self.scheduler.reserve(self._offered):
            each = self._tries[sequence.request.request_id]
            each.arrived = Positions(sequence.num_computed // self.scheduler.block_size)
            each.usage.reserved, each.usage.first_cached = self.now, sequence.num_computed
            each.waits_since = self.now
            self._pull(each)

    def complete(self, plan: StepPlan, sampled: Seq[Seq[SampledToken]]) -> list[Sequence]:
        """Take in a step's tokens."""
        touched = self.scheduler.complete(plan, sampled)
        for sequence in touched:
            each = self._tries[sequence.request.request_id]
            each.strikes = 0
            self._report(each)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if sequence.hand_off and not sequence.finished:
                each = self._tries[sequence.request.request_id]
                if sequence in touched and sequence not in self.scheduler.held:
                    self._fail(each, f"worker {self.name}: preempted before its blocks could be pulled")
                elif sequence.num_computed >= chunk.end:  # not preempted since
                    self._publish(each, chunk.end)
        return touched

    def roll_back(self, plan: StepPlan) -> None:
        """The step failed. A sequence under which steps keep failing is given up here."""
        self.scheduler.roll_back(plan)
        for chunk in plan.chunks:
            each = self._tries.get(chunk.sequence.request.request_id)
            if each is not None and not each.sequence.finished:
                each.strikes += 1

    def step_failed(self, error: BaseException, now: float) -> None:
        """Why the step that was rolled back last failed."""
        self.now = now
        for each in [each for each in self._tries.values() if each.strikes >= MAX_STRIKES]:
            self._fail(each, f"worker {self.name}: {type(error).__name__}: {error}")

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

    # ------------------------------------------------------------------ source: publish, hold, release

    def _publish(self, each: Try, end: int) -> None:
        """Tell of the blocks of tokens `[0, end)`, which are computed."""
        sequence = each.sequence
        token, count = None, end // self.scheduler.block_size
        if sequence in self.scheduler.held:
            top = sequence.logprobs[-1] if sequence.logprobs else None
            last = sequence.tokens[-1]
            token, count = SampledToken(last, top[last].logprob if top else 0.0, top), len(sequence.blocks)
            each.lease = self.lease(self.terms, self.now)
            self.timed[each.key] = each
        if token is None and (sequence.preemptions, count) <= each.published:
            return
        each.published = (sequence.preemptions, count)
        table = sequence.blocks[:count]
        blocks: Seq[int] = table if isinstance(table, range) else tuple(table)
        self.outbox.append(Published(each.key, blocks, self.generations(blocks), end, token))

    def generations(self, blocks: Seq[int]) -> Seq[int]:
        """Of blocks that are to be published."""
        return tuple(map(self.generation, blocks))

    # ------------------------------------------------------------------ target: pull, adopt

    def _pull(self, each: Try) -> None:
        """Start pulling what the source has and we lack; adopt when nothing is missing."""
        offer, sequence = each.offer, each.sequence
        if offer is None or offer is each.spent or sequence not in self.scheduler.receiving:
            return
        whole = offer.token is not None and len(each.arrived) == len(sequence.blocks)
        if not whole and (wanted := self._wanted(each, len(offer.blocks))):
            assert each.source is not None
            positions = compact(wanted)
            pull = Pull(
                self._next_pull,
                each.source,
                _picked(offer.blocks, positions),
                _picked(offer.generations, positions),
                _picked(sequence.blocks, positions),
            )
            self._next_pull += 1
            each.under_way[pull.pull_id] = positions
            self._pulling[pull.pull_id] = (each, offer)
            self.pulls.append(pull)
        elif whole and not each.under_way:
            self._adopt(each, offer)

    def _wanted(self, each: Try, offered: int) -> Seq[int]:
        """Positions to pull now, in ascending order."""
        return self.missing(offered, set(each.arrived), set().union(*each.under_way.values()))

    def _adopt(self, each: Try, offer: Published) -> None:
        assert offer.token is not None
        sequence = each.sequence
        assert offer.num_tokens == len(sequence.tokens), "the source has computed something else"
        each.usage.adopted = self.now
        self.outbox.append(Received(each.key))
        each.source = None
        del self.timed[each.key]
        each.sent += 1  # the source has reported this one
        self.scheduler.adopt(sequence, offer.token)
        if sequence.finished:  # the source would have seen it
            self._report(each)

    def pull_ended(self, result: PullResult, now: float) -> None:
        """Take in what the transport says of a pull; also of one that could not be started."""
        self.now = now
        each, offer = self._pulling.pop(result.pull_id)
        positions = each.under_way.pop(result.pull_id)
        each.usage.pulls += ((result.started, result.finished),)
        each.usage.received_bytes += result.num_bytes
        if each.dropped:
            if not each.under_way:
                self._finish(each)
            return
        if result.status is PullStatus.DONE:
            each.arrived.add(positions)
        elif result.status is PullStatus.STALE:
            # The source was preempted, or its lease ran out: it publishes again, or says that it failed.
            if each.offer is offer:
                each.spent = offer
        else:
            self._fail(each, f"worker {self.name}: pulling from {each.source} failed: {result.error}")
            return
        each.waits_since = now
        self._pull(each)

    # ------------------------------------------------------------------ time

    def tick(self, now: float) -> None:
        """Renew leases as target, end those that nobody renews as source, give up what waits too long."""
        self.now = now
        for each in list(self.timed.values()):
            if each.dropped:
                continue
            if each.lease is not None and each.lease.expired(now):
                self._fail(
                    each, f"worker {self.name}: nobody pulled the blocks within {self.terms.duration} s"
                )
            elif each.source is not None:
                if now >= each.renew_at:
                    each.renew_at = now + self.terms.renewal
                    self.outbox.append(Extend(each.key))
                if self._waits_here(each) and now >= self._gives_up_at(each):
                    self._fail(each, f"worker {self.name}: {self._what_it_waits_for(each)}")

    def _waits_here(self, each: Try) -> bool:
        """True if the source has done its part, and we don't get on."""
        return each.offer is not None and each.offer.token is not None and not each.under_way

    def _gives_up_at(self, each: Try) -> float:
        """A full worker that gets on will have room in time; one where nothing ends may wait for somebody who waits
        for it. Even so there is an end: others may be luckier each time."""
        patience = self.terms.patience
        if each.sequence not in self.scheduler.expected:
            return each.waits_since + patience
        return min(max(each.waits_since, self._freed_at) + patience, each.waits_since + 10 * patience)

    def _what_it_waits_for(self, each: Try) -> str:
        scheduler = self.scheduler
        if each.sequence in scheduler.expected:
            needed = blocks_for(len(each.sequence.tokens) + 1, scheduler.block_size)
            places = len(scheduler.running) + scheduler.promised
            return (
                f"no room for {needed} blocks within {self.terms.patience} s ({scheduler.allocator.num_free} of "
                f"{scheduler.allocator.num_blocks} are free, {places} of {scheduler.max_num_seqs} sequences run)"
            )
        return f"{each.source} re-used blocks and did not publish them again within {self.terms.patience} s"

    def next_wakeup(self) -> float | None:
        """When `tick` has something to do next, if nothing else happens."""
        times: list[float] = []
        for each in self.timed.values():
            if each.lease is not None:
                times.append(each.lease.until)
            if each.source is not None and not each.dropped:
                times.append(each.renew_at)
                if self._waits_here(each):
                    times.append(self._gives_up_at(each))
        return min(times, default=None)

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

    # ------------------------------------------------------------------ looking after itself

    @property
    def idle(self) -> bool:
        """True if it holds nothing for anybody."""
        return not self._tries

    def beat(self) -> Beat:
        """A snapshot for the controller."""
        scheduler = self.scheduler
        prompts = [s for s in (*scheduler.waiting, *scheduler.running) if not s.is_decoding]
        return Beat(
            running=scheduler.num_running,
            waiting=len(scheduler.waiting),
            expected=len(scheduler.expected) + len(scheduler.receiving),
            held=len(scheduler.held),
            blocks_free=scheduler.allocator.num_free,
            steps=scheduler.num_steps,
            prefill_tokens=sum(s.remaining for s in prompts),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if a block, a try or a pull is lost."""
        self.scheduler.check_integrity()
        live = {s.request.request_id for s in self.scheduler._queued()}
        assert live == set(self._tries), f"known but not queued, or the reverse: {live ^ set(self._tries)}"
        pulls = {pull for each in self._tries.values() for pull in each.under_way}
        assert pulls == set(self._pulling), "a pull is lost"
