"""The scheduler under random load, checked against rollouts made without it."""

from __future__ import annotations

import math
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.core import (
    PENDING,
    BeamSearchParams,
    FinishReason,
    Request,
    SampledToken,
    SamplingParams,
    Sequence,
    StepPlan,
)
from nanopd_lab.engine.scheduler import Scheduler
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.kv import BlockAllocator, blocks_for
from tests.engine.symbolic import EOS, SymbolicRunner, next_token, rollout, top_logprobs


def make(
    num_blocks: int = 32, block_size: int = 4, budget: int = 16, seqs: int = 8, caching: bool = True
) -> Scheduler:
    return Scheduler(
        BlockAllocator(num_blocks, caching),
        block_size=block_size,
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        max_model_len=10_000,
        eos_token_ids=frozenset({EOS}),
    )


def request(name: str, prompt: list[int], max_tokens: int = 4, n: int = 1, **more: object) -> Request:
    return Request(name, prompt, SamplingParams(n=n, max_tokens=max_tokens, **more))  # type: ignore[arg-type]


UnderWay = deque[tuple[StepPlan, list[list[SampledToken]]]]


def drive(
    scheduler: Scheduler,
    runner: SymbolicRunner,
    done: dict[str, dict[int, Sequence]],
    under_way: UnderWay | None = None,
    ahead: int = 0,
) -> bool:
    """One step, with every check; False if there was nothing to do.

    The step is completed at once, or, if it is to be planned `ahead`, when so many others have been planned.
    """
    under_way = deque() if under_way is None else under_way
    plan = scheduler.schedule()
    if plan is not None:
        assert 0 < plan.num_tokens <= scheduler.budget
        assert len({id(chunk.sequence) for chunk in plan.chunks}) == len(plan.chunks)
        under_way.append((plan, runner.execute(plan)))
    scheduler.check_integrity()
    if not under_way:
        return False
    if plan is None or len(under_way) > ahead:
        for sequence in scheduler.complete(*under_way.popleft()):
            done.setdefault(sequence.request.request_id, {})[sequence.index] = sequence
        scheduler.check_integrity()
    return True


@st.composite
def workloads(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """(arrival step, request); prompts over a few tokens, so that prefixes are often shared."""
    shared = draw(st.lists(st.integers(1, 5), min_size=0, max_size=20))
    jobs = []
    for number in range(draw(st.integers(1, 10))):
        own = draw(st.lists(st.integers(1, 5), min_size=1, max_size=24))
        prompt = shared[: draw(st.integers(0, len(shared)))] + own
        params = SamplingParams(n=draw(st.integers(1, 3)), max_tokens=draw(st.integers(1, 12)))
        jobs.append((draw(st.integers(0, 20)), Request(f"r{number}", prompt, params)))
    return jobs


@settings(max_examples=150, deadline=None)
@given(
    jobs=workloads(),
    block_size=st.sampled_from([1, 3, 4, 16]),
    budget=st.sampled_from([1, 2, 5, 7, 16, 64]),
    seqs=st.sampled_from([3, 4, 16]),
    spare=st.integers(0, 30),
    caching=st.booleans(),
    aborts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=4),
    failures=st.sets(st.integers(0, 40), max_size=3),
    ahead=st.integers(0, 1),
)
def test_every_request_finishes_with_the_right_tokens(
    jobs: list[tuple[int, Request]],
    block_size: int,
    budget: int,
    seqs: int,
    spare: int,
    caching: bool,
    aborts: list[tuple[int, int]],
    failures: set[int],
    ahead: int,
) -> None:
    # As small as it may be, so that preemption is common.
    longest = max(len(r.prompt_token_ids) + r.params.max_tokens for _, r in jobs)
    num_blocks = blocks_for(longest, block_size) + spare
    scheduler = make(num_blocks, block_size, budget, seqs, caching)
    runner = SymbolicRunner(num_blocks, block_size)
    done: dict[str, dict[int, Sequence]] = {}
    under_way: UnderWay = deque()
    pending = sorted(jobs, key=lambda job: job[0])
    aborted: set[str] = set()
    for step in range(5000):
        while pending and pending[0][0] <= step:
            scheduler.add(pending.pop(0)[1])
        for when, number in aborts:
            if when == step and scheduler.abort(f"r{number}"):
                aborted.add(f"r{number}")
        if step in failures and (plan := scheduler.schedule()) is not None:
            scheduler.roll_back(plan)
        if not drive(scheduler, runner, done, under_way, ahead) and not pending:
            break
    assert not scheduler.has_unfinished, "somebody starved"
    assert scheduler.allocator.num_free == num_blocks, "a block leaked"
    for _, job in jobs:
        if job.request_id in aborted:
            continue
        outputs = done[job.request_id]
        assert sorted(outputs) == list(range(job.params.n))
        for index, sequence in outputs.items():
            assert sequence.output_token_ids == rollout(job.prompt_token_ids, job.params, index)
            ended_by_eos = sequence.output_token_ids[-1] == EOS
            assert sequence.finish_reason == (FinishReason.STOP if ended_by_eos else FinishReason.LENGTH)


def beams_by_hand(prompt: list[int], params: BeamSearchParams) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search over the symbolic model, without blocks."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, tuple(prompt))]
    finished = []
    for _ in range(params.max_tokens):
        offers = []
        for score, tokens in live:
            for token, entry in top_logprobs(list(tokens), 2 * params.beam_width).items():
                extended = (score + entry.logprob, (*tokens, token))
                (finished if token == EOS and not params.ignore_eos else offers).append(extended)
        live = sorted(offers, key=lambda beam: beam[0], reverse=True)[: params.beam_width]
    return sorted(finished + live, key=lambda beam: beam[0], reverse=True)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=12), min_size=1, max_size=4),
    width=st.integers(1, 4),
    max_tokens=st.integers(1, 8),
    block_size=st.sampled_from([1, 3, 4]),
    budget=st.sampled_from([1, 3, 16]),
    spare=st.integers(0, 12),
    ignore_eos=st.booleans(),
    ahead=st.integers(0, 1),
)
def test_beam_search_under_pressure(
    prompts: list[list[int]],
    width: int,
    max_tokens: int,
    block_size: int,
    budget: int,
    spare: int,
    ignore_eos: bool,
    ahead: int,
) -> None:
    num_blocks = blocks_for(max(map(len, prompts)) + max_tokens, block_size) + spare
    scheduler, runner = make(num_blocks, block_size, budget), SymbolicRunner(num_blocks, block_size)
    params = BeamSearchParams(width, max_tokens, ignore_eos)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=2 * width)
    groups = {}
    for number, prompt in enumerate(prompts):
        scheduler.add(Request(f"b{number}", prompt, sampling, beam=params))
        groups[number] = scheduler.beam_group(f"b{number}")
    done: dict[str, dict[int, Sequence]] = {}
    under_way: UnderWay = deque()
    for _ in range(5000):
        if not drive(scheduler, runner, done, under_way, ahead):
            break
    assert not scheduler.has_unfinished, "beams wait for each other for ever"
    assert scheduler.allocator.num_free == num_blocks, "a block leaked"
    for number, prompt in enumerate(prompts):
        group = groups[number]
        assert group is not None
        got = [(beam.cumulative_logprob, beam.tokens) for beam in group.finished] + [
            (sequence.cumulative_logprob, tuple(sequence.tokens))
            for sequence in done[f"b{number}"].values()
            if sequence.finish_reason == FinishReason.LENGTH
        ]
        got.sort(key=lambda beam: beam[0], reverse=True)
        expected = beams_by_hand(prompt, params)
        assert [tokens for _, tokens in got] == [tokens for _, tokens in expected]
        assert all(math.isclose(a, b) for (a, _), (b, _) in zip(got, expected, strict=True))


def test_an_error_in_one_beam_ends_the_request() -> None:
    scheduler, runner = make(budget=1), SymbolicRunner(32, 4)  # budget 1: beams get their candidates in turn
    sampling = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=6)
    scheduler.add(Request("b", [1, 2, 3], sampling, beam=BeamSearchParams(3, 9)))
    done: dict[str, dict[int, Sequence]] = {}
    while len(scheduler.running) < 3:
        drive(scheduler, runner, done)
    drive(scheduler, runner, done)
    plan = scheduler.schedule()
    assert plan is not None
    ended = scheduler.complete(plan, [[SampledToken(-1, error="planted")] for _ in plan.chunks])
    assert {sequence.finish_reason for sequence in ended} == {FinishReason.ERROR}
    assert len(ended) == 3
    assert not scheduler.has_unfinished
    assert scheduler.allocator.num_free == 32
    scheduler.check_integrity()


def test_decodes_and_chunks_share_a_step() -> None:
    scheduler, runner = make(budget=8), SymbolicRunner(32, 4)
    scheduler.add(request("a", [1, 2, 3], max_tokens=20, ignore_eos=True))
    done: dict[str, dict[int, Sequence]] = {}
    drive(scheduler, runner, done)
    scheduler.add(request("b", [4] * 20))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(c.sequence.request.request_id, c.start, c.count, c.samples) for c in plan.chunks] == [
        ("a", 3, 1, 1),
        ("b", 0, 7, 0),
    ]
    assert plan.num_decodes == 1


def test_several_prompts_are_prefilled_in_one_step() -> None:
    scheduler = make(budget=16)
    for name in "abc":
        scheduler.add(request(name, [1, 2, 3, 4, 5]))
    plan = scheduler.schedule()
    assert plan is not None
    assert [chunk.count for chunk in plan.chunks] == [5, 5, 5]


def test_admission_waits_for_the_whole_prompt_to_fit() -> None:
    scheduler, runner = make(num_blocks=6, budget=4, caching=False), SymbolicRunner(6, 4)
    scheduler.add(request("a", [1] * 12, max_tokens=1))  # 3 blocks now, a fourth never
    scheduler.add(request("b", [2] * 16, max_tokens=1))  # 4 blocks: not while `a` needs 3 of 6
    done: dict[str, dict[int, Sequence]] = {}
    for _ in range(3):
        drive(scheduler, runner, done)
    assert "a" in done
    assert scheduler.num_preemptions == 0
    while drive(scheduler, runner, done):
        pass
    assert "b" in done
    assert scheduler.num_preemptions == 0


def test_the_oldest_is_never_preempted() -> None:
    scheduler, runner = make(num_blocks=6, block_size=4, caching=False), SymbolicRunner(6, 4)
    first = scheduler.add(request("a", [1] * 8, max_tokens=16, ignore_eos=True))
    scheduler.add(request("b", [2] * 8, max_tokens=16, ignore_eos=True))
    done: dict[str, dict[int, Sequence]] = {}
    while drive(scheduler, runner, done):
        pass
    assert scheduler.num_preemptions > 0
    assert first.preemptions == 0
    assert {len(done[name][0].output_token_ids) for name in "ab"} == {16}


def test_fewer_tokens_than_decodes_are_shared_fairly() -> None:
    scheduler, runner = make(budget=2, seqs=8), SymbolicRunner(32, 4)
    scheduler.add(request("a", [1, 2], max_tokens=18, n=5, ignore_eos=True))
    done: dict[str, dict[int, Sequence]] = {}
    for _ in range(40):
        drive(scheduler, runner, done)
        lengths = [sequence.output_len for sequence in done.get("a", {}).values()]
        assert not lengths or max(lengths) - min(lengths) <= 1


def test_prefix_cache_is_used_and_counted() -> None:
    scheduler, runner = make(), SymbolicRunner(32, 4)
    done: dict[str, dict[int, Sequence]] = {}
    for name in ("a", "b"):
        scheduler.add(request(name, [1, 2, 3, 4, 1, 2, 3, 4, 9], max_tokens=1))
        while drive(scheduler, runner, done):
            pass
    assert done["a"][0].tokens_cached == 0
    assert done["b"][0].tokens_cached == 8
    assert done["b"][0].tokens_computed == 1


def test_a_failed_step_loses_nothing() -> None:
    scheduler, runner = make(), SymbolicRunner(32, 4)
    job = request("a", [1, 2, 3, 4, 5], max_tokens=6, n=2, ignore_eos=True)
    scheduler.add(job)
    done: dict[str, dict[int, Sequence]] = {}
    drive(scheduler, runner, done)
    plan = scheduler.schedule()  # holds a copy-on-write that never happens
    assert plan is not None
    assert plan.copies
    scheduler.roll_back(plan)
    scheduler.check_integrity()
    while drive(scheduler, runner, done):
        pass
    for index in range(2):
        assert done["a"][index].output_token_ids == rollout(job.prompt_token_ids, job.params, index)
    assert scheduler.allocator.num_free == 32


def test_abort_while_a_step_runs_drops_what_it_brings() -> None:
    scheduler, runner = make(), SymbolicRunner(32, 4)
    scheduler.add(request("a", [1] * 6))
    plan = scheduler.schedule()
    assert plan is not None
    sampled = runner.execute(plan)
    (ended,) = scheduler.abort("a")
    assert scheduler.allocator.num_free == 32, (
        "later steps run after this one: they may have the blocks at once"
    )
    assert scheduler.complete(plan, sampled) == []
    assert ended.output_token_ids == []
    assert ended.pending == 0
    scheduler.abort("a")  # again, and unknown: ignored
    scheduler.abort("nobody")
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (request("x", []), "the prompt is empty"),
        (request("x", [1] * 9_999, max_tokens=2), r"10001 tokens, over the limit max_model_len = 10000"),
        (request("x", [1] * 100, max_tokens=29), "needs 33 blocks of 4 tokens, the KV pool has 32"),
        (request("x", [1], n=9), "9 samples or beams of one prompt, over the limit max_num_seqs = 8"),
    ],
)
def test_what_can_never_run_is_refused(job: Request, message: str) -> None:
    scheduler = make()
    with pytest.raises(InvalidRequestError, match=message):
        scheduler.add(job)
    assert not scheduler.has_unfinished
    assert scheduler.allocator.num_free == 32


def test_an_id_in_use_is_refused() -> None:
    scheduler = make()
    scheduler.add(request("a", [1]))
    with pytest.raises(InvalidRequestError, match="'a' is already in use"):
        scheduler.add(request("a", [1]))


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    scheduler, runner = make(), SymbolicRunner(32, 4)
    job = request("a", [1, 2, 3], max_tokens=3, ignore_eos=True)
    sequence = scheduler.add(job)
    plans = [scheduler.schedule(), scheduler.schedule(), scheduler.schedule()]
    assert [(c.start, c.count) for plan in plans if plan for c in plan.chunks] == [(0, 3), (3, 1), (4, 1)]
    assert sequence.tokens == [1, 2, 3, PENDING, PENDING]
    assert sequence.output_token_ids == []
    assert scheduler.schedule() is None, "the third token is the last, nothing can follow"
    for number, plan in enumerate(plans, 1):
        assert plan is not None
        scheduler.complete(plan, runner.execute(plan))
        assert sequence.output_len == number
    assert sequence.output_token_ids == rollout(job.prompt_token_ids, job.params, 0)
    assert sequence.finished


def test_what_was_planned_behind_a_stop_token_is_dropped() -> None:
    scheduler, runner = make(caching=False), SymbolicRunner(32, 4)
    prompt = next([x, y, z] for x in range(1, 50) for y in range(50) for z in range(50)
                  if next_token([x, y, z], 0) == EOS)  # fmt: skip
    sequence = scheduler.add(request("a", prompt, max_tokens=9))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    sampled = runner.execute(first), runner.execute(second)
    assert scheduler.complete(first, sampled[0]) == [sequence]
    assert sequence.finish_reason == FinishReason.STOP
    assert scheduler.complete(second, sampled[1]) == []
    assert sequence.output_token_ids == [EOS]
    assert scheduler.allocator.num_free == 32
    assert not scheduler.has_unfinished


@pytest.mark.parametrize("counts", [[100], [-1], [], [1, 1]])
def test_a_wrong_chunk_policy_is_named(counts: list[int]) -> None:
    scheduler = make()
    scheduler.chunk_policy = lambda num_decodes, prefills, budget: counts
    scheduler.add(request("a", [1] * 6))
    with pytest.raises(ValueError, match="the chunk policy returned"):
        scheduler.schedule()
    scheduler.check_integrity()
