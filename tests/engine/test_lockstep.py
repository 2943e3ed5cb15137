"""A `LockstepScheduler` does to sequences and pool what a `HandoverScheduler` does, to the number of blocks of each."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.core import Request, SamplingParams
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.engine.lockstep import LockstepScheduler
from nanopd_lab.kv import BlockAllocator, CountedBlocks
from tests.engine.test_decode_run import TOKEN, step


def state(scheduler: HandoverScheduler) -> list[object]:
    """Everything but `last_served`, of which only the order matters."""
    stats = scheduler.allocator.stats()
    sequences = [
        (
            s.request.request_id,
            s.tokens,
            s.num_computed,
            len(s.blocks),
            s.tokens_computed,
            s.preemptions,
            s.in_flight,
        )
        for s in (*scheduler.running, *scheduler.waiting)
    ]
    served = [s.request.request_id for s in sorted(scheduler.running, key=lambda s: s.last_served)]
    pool = (scheduler.allocator.num_free, stats)
    return [sequences, served, pool, scheduler.num_steps, scheduler.serves, scheduler.num_preemptions]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_it_does_what_the_plain_one_does(data: st.DataObject) -> None:
    """Prompts and decodes mixed, preemption, aborts, budgets smaller than the batch; looked at or not between steps."""
    blocks = data.draw(st.sampled_from([10, 14, 30, 100]))
    options: dict[str, int] = {
        "block_size": data.draw(st.sampled_from([2, 3, 4])),
        "max_num_batched_tokens": data.draw(st.sampled_from([3, 4, 12, 100])),
        "max_num_seqs": data.draw(st.sampled_from([2, 3, 8])),
        "max_model_len": 1_000,
    }
    plain = HandoverScheduler(BlockAllocator(blocks, False), **options)
    quick = LockstepScheduler(CountedBlocks(blocks), token=TOKEN, **options)
    both = (plain, quick)
    for number in range(data.draw(st.integers(1, 12))):
        length, most = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 10))
        params = SamplingParams(max_tokens=most, ignore_eos=True)
        for scheduler in both:
            scheduler.add(Request(f"r{number}", [1] * length, params))
        for _ in range(data.draw(st.integers(0, 5))):
            steps = quick.run_length(data.draw(st.integers(1, 5)))
            if steps:
                quick.advance(steps)
            elif step(quick):
                steps = 1
            for _ in range(steps):
                assert step(plain)
            if data.draw(st.booleans()):
                quick.unpark()
                assert state(quick) == state(plain)
                quick.check_integrity()
        if data.draw(st.integers(0, 4)) == 0:
            aborted = f"r{data.draw(st.integers(0, number))}"
            for scheduler in both:
                scheduler.abort(aborted)
    while plain.has_unfinished:
        assert step(quick)
        assert step(plain)
        assert quick.num_running == len(plain.running)
    assert not quick.has_unfinished
    assert state(quick) == state(plain)


def test_a_step_of_parked_sequences_lists_none_of_them() -> None:
    scheduler = LockstepScheduler(
        CountedBlocks(100),
        token=TOKEN,
        block_size=4,
        max_num_batched_tokens=16,
        max_num_seqs=8,
        max_model_len=100,
    )
    for number in range(3):
        scheduler.add(Request(f"r{number}", [1] * 3, SamplingParams(max_tokens=20, ignore_eos=True)))
    assert step(scheduler)  # three prompts
    assert scheduler.run_length(1_000) == 19
    assert (scheduler.lockstepping, scheduler.total_context) == (3, 9)
    scheduler.advance(5)
    assert scheduler.contexts() == [8, 8, 8]
    scheduler.add(Request("late", [1] * 9, SamplingParams(max_tokens=2, ignore_eos=True)))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(chunk.sequence.request.request_id, chunk.count) for chunk in plan.chunks] == [("late", 9)]
    scheduler.complete(plan, [[TOKEN]])
    scheduler.unpark()
    assert [s.num_computed for s in scheduler.running] == [9, 9, 9, 9]
    scheduler.check_integrity()
