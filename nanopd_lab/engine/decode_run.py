"""Many equal decode steps at once: what the simulator jumps over instead of planning one by one.

While every running sequence decodes and nobody can join or has to leave, the steps of `Scheduler.schedule` and
`complete` differ in nothing but the length of the contexts. `equal_steps` says for how long that lasts, `advance` does
the same to sequences and allocator as so many steps would, down to which block goes to whom. Nothing here decides
anything: it only recognises when the scheduler has no decision to make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from nanopd_lab.core import FinishReason, SampledToken
from nanopd_lab.core import Sequence as Seq
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.kv import Allocator, BlockAllocator, blocks_for


def equal_steps(scheduler: HandoverScheduler, most: int) -> int:
    """Decode steps, at most `most`, that can follow with no decision of the scheduler; 0 if there is one to make now.

    The last of them may end sequences, by their `max_tokens`; the caller vouches that no token ends one earlier. Room
    for expected sequences must have been looked for (`reserve`) just now: what found none finds none during the run,
    since blocks only become fewer.
    """
    running = scheduler.running
    if not running or len(running) > scheduler.budget:
        return 0
    size, need = scheduler.block_size, 0
    for sequence in running:
        length, request = len(sequence.tokens), sequence.request
        done = length - sequence.prompt_len
        if length - sequence.num_computed != 1 or done < 1 or sequence.hand_off or sequence.in_flight:
            return 0
        if (left := request.params.max_tokens - done) < most:
            most = left
    if not admission_blocked(scheduler):
        return 0
    # A decode that finds no block preempts: a decision. `need` is an upper bound, looked at closely only if too high.
    need = len(running) * (most // size + 1)
    free = scheduler.allocator.num_free
    if need > free:
        low, high = 0, most  # the most steps whose blocks are there
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if blocks_taken(scheduler, middle) <= free else (low, middle - 1)
        most = low
    return most


def admission_blocked(scheduler: HandoverScheduler) -> bool:
    """True if nobody waits, or if what keeps the first one out cannot get better during a run."""
    caching = scheduler.blocks.caching
    if scheduler.expected and caching:
        return False  # blocks that the run fills may turn up in the prefix cache
    if not scheduler.waiting or scheduler.num_running == scheduler.budget:
        return True
    places = min(scheduler.max_num_seqs, scheduler.budget) - scheduler.promised
    if len(scheduler.running) >= places:
        return True
    if caching:
        return False
    needed = blocks_for(len(scheduler.waiting[0].tokens), scheduler.block_size)
    return needed > scheduler.allocator.num_free


def blocks_taken(scheduler: HandoverScheduler, steps: int) -> int:
    """Blocks that `steps` decode steps of all running sequences take from the allocator."""
    size, count = scheduler.block_size, 0
    for sequence in scheduler.running:
        over = sequence.num_computed + steps - len(sequence.blocks) * size
        if over > 0:
            count += blocks_for(over, size)
    return count


def taken_by_then(scheduler: HandoverScheduler, steps: int, blocks: Iterable[int]) -> bool:
    """True if one of the free `blocks` is handed out anew within the first `steps` steps of a run."""
    return handed_out_soon(scheduler.allocator, blocks_taken(scheduler, steps), blocks)


def handed_out_soon(allocator: Allocator, count: int, blocks: Iterable[int]) -> bool:
    """True if one of the free `blocks` is among the next `count` that the allocator hands out."""
    assert isinstance(allocator, BlockAllocator), (
        "only there is the order known in which blocks are handed out"
    )
    soon = set(islice(allocator.free, count))
    soon.update(islice(allocator.evictable, max(0, count - len(allocator.free))))
    return not soon.isdisjoint(blocks)


def advance(scheduler: HandoverScheduler, steps: int, token: SampledToken) -> list[Seq]:
    """Do `steps` decode steps of all running sequences, each of which gives each of them `token`.

    `steps` is at most what `equal_steps` said. Returns the sequences that ended, in order.
    """
    running, size, blocks = scheduler.running, scheduler.block_size, scheduler.blocks
    events: list[tuple[int, int, int]] = []  # step, 0 for planning or 1 for completing it, place in the batch
    last = scheduler.serves + (steps - 1) * len(running)
    ended = []
    for place, sequence in enumerate(running):
        computed = sequence.num_computed
        sequence.append_same(token.token, steps)
        sequence.num_computed = computed + steps
        sequence.tokens_computed += steps
        sequence.cumulative_logprob += token.logprob * steps
        sequence.last_served = last + place + 1
        room = len(sequence.blocks) * size - computed
        if room < steps:
            events += [(step, 0, place) for step in range(room + 1, steps + 1, size)]
        if blocks.caching:
            first = size - computed % size
            events += [(step, 1, place) for step in range(first, steps + 1, size)]
        if len(sequence.tokens) - sequence.prompt_len >= sequence.request.params.max_tokens:
            ended.append(sequence)
    scheduler.serves = last + len(running)
    scheduler.num_steps += steps
    _hand_out(scheduler, events, steps)
    for sequence in ended:
        scheduler.finish(sequence, FinishReason.LENGTH)
    return ended


def _hand_out(scheduler: HandoverScheduler, events: Sequence[tuple[int, int, int]], steps: int) -> None:
    """Take and register blocks in the order in which the steps would."""
    running, blocks, size = scheduler.running, scheduler.blocks, scheduler.block_size
    if blocks.caching:
        for step, completes, place in sorted(events):
            sequence = running[place]
            if completes:
                blocks.register(sequence, sequence.num_computed - steps + step)
            else:
                table = sequence.blocks
                assert isinstance(table, list)
                blocks.grow_table(table, sequence.num_computed - steps + step, size, scheduler.allocator)
    elif events:
        taken = scheduler.allocator.allocate(len(events))
        for (_, _, place), block in zip(sorted(events), taken, strict=True):
            table = running[place].blocks
            assert isinstance(table, list)
            table.append(block)
