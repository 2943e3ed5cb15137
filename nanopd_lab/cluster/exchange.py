"""How blocks get from one worker to another, seen from either: published, held under a lease, pulled, adopted.

source   publishes what is computed, chunk by chunk; holds all of it once the last chunk is, under a lease
target   has room reserved, pulls what is offered and missing, renews the lease; adopts when nothing is missing
"""

from __future__ import annotations

from collections.abc import Callable, Container
from collections.abc import Sequence as Seq

from nanopd_lab.cluster.lease import Lease, LeaseTerms
from nanopd_lab.cluster.messages import Extend, Published, Received
from nanopd_lab.cluster.positions import Positions, compact
from nanopd_lab.cluster.tries import Tries, Try
from nanopd_lab.core import SampledToken
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.kv import blocks_for
from nanopd_lab.transfer import Pull, PullResult, PullStatus


def missing_blocks(offered: int, arrived: Container[int], under_way: Container[int]) -> list[int]:
    """Positions in the block table that can be pulled now: the source offers the first `offered` of them, and what is
    here or on its way need not be asked for again. In ascending order."""
    return [position for position in range(offered) if position not in arrived and position not in under_way]


def _picked(values: Seq[int], positions: range | tuple[int, ...]) -> Seq[int]:
    """The values at these positions, which mostly follow each other: a slice is quicker."""
    if isinstance(positions, range):
        return values[positions.start : positions.stop]
    return [values[position] for position in positions]


class BlockExchange(Tries):
    """See the module. A subclass may replace `missing`, as a function with the same meaning.

    Args:
        name, scheduler, stream: see `Tries`
        terms: of leases
        generation: of a block of the own pool; None: the allocator's
        lease: makes a `Lease`
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
        super().__init__(name, scheduler, stream)
        self.terms = terms or LeaseTerms()
        self.generation = generation or scheduler.allocator.generation  # type: ignore[attr-defined]
        self.lease = lease
        self.pulls: list[Pull] = []  # to be started
        self._pulling: dict[int, tuple[Try, Published]] = {}
        self._next_pull = 0

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

    # ------------------------------------------------------------------ target: reserve, pull, adopt

    def _reserve(self) -> None:
        for sequence in self.scheduler.reserve(self._offered):
            each = self._tries[sequence.request.request_id]
            each.arrived = Positions(sequence.num_computed // self.scheduler.block_size)
            each.usage.reserved, each.usage.first_cached = self.now, sequence.num_computed
            each.waits_since = self.now
            self._pull(each)

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
