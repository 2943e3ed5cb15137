"""`advance(k)` does to sequences and allocator what k times `schedule` and `complete` do, to the last block."""

from __future__ import annotations

import copy

from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.core import Request, SampledToken, SamplingParams
from nanopd_lab.engine.decode_run import advance, blocks_taken, equal_steps, taken_by_then
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.kv import BlockAllocator

TOKEN = SampledToken(0, -0.5)


def step(scheduler: HandoverScheduler) -> bool:
    plan = scheduler.schedule()
    if plan is None:
        return False
    scheduler.complete(plan, [[TOKEN] * chunk.samples for chunk in plan.chunks])
    return True


def state(scheduler: HandoverScheduler) -> list[object]:
    allocator = scheduler.allocator
    assert isinstance(allocator, BlockAllocator)
    sequences = [
        (
            s.request.request_id,
            s.tokens,
            s.num_computed,
            s.blocks,
            s.block_hashes,
            s.num_registered,
            s.last_served,
            s.tokens_computed,
            s.tokens_cached,
            s.cumulative_logprob,
            s.finish_reason,
            s.in_flight,
        )
        for s in (*scheduler.running, *scheduler.waiting)
    ]
    pool = [list(allocator.free), allocator.refs, list(allocator.generations), allocator.contents]
    cache = [allocator.block_of, list(allocator.evictable), allocator.stats()]
    return [sequences, pool, cache, scheduler.num_steps, scheduler.serves, scheduler.num_preemptions]


@st.composite
def schedulers(draw: st.DrawFn) -> HandoverScheduler:
    """Somewhere in the middle of its work; the cache holds what earlier requests have left."""
    allocator = BlockAllocator(draw(st.sampled_from([10, 14, 30, 100])), draw(st.booleans()))
    scheduler = HandoverScheduler(
        allocator,
        block_size=draw(st.sampled_from([2, 3, 4])),
        max_num_batched_tokens=draw(st.sampled_from([4, 12, 100])),
        max_num_seqs=draw(st.sampled_from([2, 3, 8])),
        max_model_len=1_000,
    )
    for number in range(draw(st.integers(1, 9))):
        prompt = [draw(st.integers(0, 1)) for _ in range(draw(st.integers(1, 9)))]
        params = SamplingParams(max_tokens=draw(st.integers(1, 10)), ignore_eos=True)
        scheduler.add(Request(f"r{number}", prompt, params))
        for _ in range(draw(st.integers(0, 3))):
            step(scheduler)
    return scheduler


@settings(max_examples=200, deadline=None, derandomize=True)
@given(schedulers(), st.integers(1, 20))
def test_a_run_is_so_many_steps(scheduler: HandoverScheduler, most: int) -> None:
    while scheduler.has_unfinished:
        steps = equal_steps(scheduler, most)
        assert 0 <= steps <= most
        if steps:
            other, taken = copy.deepcopy(scheduler), blocks_taken(scheduler, steps)
            free = list(scheduler.allocator.free)  # type: ignore[attr-defined]
            before = other.allocator.stats().allocated_total
            for _ in range(steps):
                assert step(other)
            assert other.allocator.stats().allocated_total == before + taken
            for block in free:
                again = other.allocator.generation(block) != scheduler.allocator.generation(block)  # type: ignore[attr-defined]
                assert taken_by_then(scheduler, steps, [block]) == again
            advance(scheduler, steps, TOKEN)
            assert state(scheduler) == state(other)
        else:
            step(scheduler)


def test_a_decision_ends_the_run() -> None:
    """Until a sequence ends, or the pool has no block left for one."""
    allocator = BlockAllocator(8, enable_prefix_caching=False)
    scheduler = HandoverScheduler(
        allocator, block_size=4, max_num_batched_tokens=16, max_num_seqs=4, max_model_len=100
    )
    for number, length in enumerate([30, 20]):
        scheduler.add(Request(f"r{number}", [1], SamplingParams(max_tokens=length, ignore_eos=True)))
    assert equal_steps(scheduler, 1_000) == 0  # prompts first
    step(scheduler)
    assert equal_steps(scheduler, 1_000) == 15  # 16 tokens of both fill the eight blocks
    assert equal_steps(scheduler, 7) == 7
    advance(scheduler, 15, TOKEN)
    assert equal_steps(scheduler, 1_000) == 0
    step(scheduler)
    assert scheduler.num_preemptions == 1
    assert equal_steps(scheduler, 1_000) == 13  # the older one ends with 30; the other has no room
    assert [s.request.request_id for s in advance(scheduler, 13, TOKEN)] == ["r0"]
