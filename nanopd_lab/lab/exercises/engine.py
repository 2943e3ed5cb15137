"""Exercises on the scheduler."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

from nanopd_lab.core import Request, SampledToken, SamplingParams, Sequence
from nanopd_lab.engine.policies import ChunkPolicy, VictimPolicy, choose_victim, plan_chunks
from nanopd_lab.engine.scheduler import Scheduler
from nanopd_lab.kv import BlockAllocator
from nanopd_lab.lab.checking import call, expect
from nanopd_lab.lab.registry import Exercise

Case = tuple[int, list[int], int]


def check_plan_chunks(impl: ChunkPolicy) -> int:
    """The worked examples, then every step with at most 3 prompts of at most 5 tokens, then real sizes.

    First come, first served leaves one right answer, and these rules say which; each has its own message.
    """
    count = 0
    for num_decodes, prefills, budget in _chunk_cases():
        count += 1
        want = plan_chunks(num_decodes, prefills, budget)
        got = call(impl, num_decodes=num_decodes, prefills=prefills, budget=budget)
        room = budget - num_decodes
        expect(isinstance(got, list), "return a list of ints, one for each prompt", want)
        expect(
            len(got) == len(prefills), f"{len(prefills)} prompt(s) came in, so {len(prefills)} count(s)", want
        )
        for index, (given, left) in enumerate(zip(got, prefills, strict=True)):
            expect(type(given) is int, f"count {index} is not an int", want)
            expect(given >= 0, f"count {index} is negative; a prompt that gets nothing gets 0", want)
            expect(given <= left, f"prompt {index} has only {left} token(s) left", want)
        expect(
            sum(got) <= room,
            f"{sum(got)} prompt tokens and {num_decodes} decode(s) are more than the budget of {budget}",
            want,
        )
        for index, (given, left) in enumerate(zip(got, prefills, strict=True)):
            later = sum(got[index + 1 :])
            expect(
                given == left or not later,
                f"first come, first served: prompt {index} still lacks {left - given} token(s), yet a later "
                f"one gets some",
                want,
            )
        spare = room - sum(got)
        expect(got == want, f"{spare} token(s) of the budget stay empty while a prompt is waiting", want)
    return count


def _chunk_cases() -> Iterator[Case]:
    yield 0, [5], 8
    yield 2, [5], 8
    yield 2, [5, 9, 4], 8
    for length in range(4):
        for prefills in itertools.product(range(1, 6), repeat=length):
            for num_decodes, budget in itertools.product(range(4), range(1, 9)):
                if num_decodes <= budget:  # the scheduler never plans more decodes than the budget
                    yield num_decodes, list(prefills), budget
    for num_decodes, budget in ((0, 512), (17, 512), (64, 512), (511, 512), (512, 512), (3, 8192)):
        yield num_decodes, [2000], budget
        yield num_decodes, [100, 700, 30], budget
        yield num_decodes, [448, 1, 1, 4000], budget
        yield num_decodes, [33] * 20, budget
    for budget in (16_384, 131_072):
        yield 64, [40_000, 3, 90_000], budget


def check_choose_victim(impl: VictimPolicy) -> int:
    """Hand-made batches in which only the order of admission tells right from wrong; then real ones.

    The real ones come from the scheduler itself, which runs short of blocks again and again while requests
    keep arriving, with the implementation as its policy.
    """
    count = 0
    for running in _batches():
        _examine_choice(impl, running)
        count += 1
    for seed in range(4):
        count += _run_short_of_blocks(impl, seed)
    return count


def _examine_choice(impl: VictimPolicy, batch: Seq[Sequence], copied: bool = True) -> int:
    """The index of the sequence that was chosen, if it is the right one.

    Copies show whether anything is changed; the sequences themselves, whether earlier choices are remembered.
    """

    def chosen(running: Seq[Sequence]) -> tuple[int | None, object]:
        given = running if copied else list(batch)
        answer = impl(given)
        # By identity: the scheduler takes the answer out of its own list.
        found = (index for index, sequence in enumerate(given) if sequence is answer)
        return next(found, None), answer

    want = choose_victim(batch)
    name = str(getattr(impl, "__name__", type(impl).__name__))
    index, answer = call(chosen, called=name, running=list(batch))
    if index is None:
        kind = "not its index" if isinstance(answer, int) else "not something made from it"
        got = _Made(answer) if isinstance(answer, Sequence) else answer
        expect(False, f"return one of the sequences in `running` itself, {kind}", want, got)
    ages = ", ".join(str(sequence.priority) for sequence in batch)
    expect(
        batch[index] is want,
        f"of the priorities {ages} the youngest, {want.priority}, gives way: so the oldest always finishes",
        want,
        batch[index],
    )
    return int(index)


class _Made:
    """A sequence that looks like one of those that are running, and is none of them."""

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence

    def __repr__(self) -> str:
        return f"a new {self.sequence!r}"


def _batches() -> Iterator[list[Sequence]]:
    """Oldest first, as the scheduler keeps them."""
    yield [_sequence("a", 0), _sequence("b", 1)]
    yield [_sequence("b", 0, blocks=4), _sequence("a", 1)]
    yield [_sequence("a", 3), _sequence("b", 5, blocks=4)]
    yield [_sequence("a", 0, arrival=2.0), _sequence("b", 1, arrival=1.0)]
    yield [_sequence("a", 0, output=1), _sequence("b", 1, output=30)]
    yield [_sequence("a", 0, served=9), _sequence("b", 1, served=8)]
    yield [_sequence("a", 0), _sequence("b", 1, preemptions=3)]
    yield [_sequence("a", 2), _sequence("a", 2, index=1), _sequence("a", 2, index=2)]
    yield [*(_sequence("a", 2, index) for index in range(3)), _sequence("b", 3)]
    yield [_sequence("only", 7)]
    rng = random.Random(0)
    samples = [(serial, index) for serial in range(18) for index in range(_num_samples(serial))]
    for _ in range(120):
        ages = sorted(rng.sample(samples, rng.randint(1, 9)))
        yield [
            _sequence(
                f"r{rng.randrange(1000)}",
                serial,
                index,
                blocks=rng.randint(0, 9),
                output=rng.randint(0, 31),
                arrival=rng.choice((0.0, rng.random())),
                served=rng.randint(-1, 50),
                preemptions=rng.randint(0, 3),
                in_flight=rng.randint(0, 1),
            )
            for serial, index in ages
        ]


def _num_samples(serial: int) -> int:
    return 1 + serial % 3


def _sequence(
    name: str,
    serial: int,
    index: int = 0,
    blocks: int = 2,
    output: int = 4,
    arrival: float = 0.0,
    served: int = 5,
    preemptions: int = 0,
    in_flight: int = 0,
) -> Sequence:
    """A running sequence as the scheduler would hand it over."""
    length = max(1, 16 * blocks - output)
    params = SamplingParams(n=_num_samples(serial), max_tokens=32)
    request = Request(name, [1] * length, params, arrival, serial=serial)
    computed = min(length + output - 1, 16 * blocks)
    sequence = Sequence(request, index, tokens=[1] * (length + output), num_computed=computed)
    sequence.blocks = list(range(blocks))
    sequence.last_served, sequence.preemptions, sequence.in_flight = served, preemptions, in_flight
    return sequence


def _run_short_of_blocks(impl: VictimPolicy, seed: int) -> int:
    """Run the scheduler on too few blocks for all; the number of victims that it asked for."""
    rng = random.Random(seed)
    asked = 0

    def policy(running: Seq[Sequence]) -> Sequence:
        nonlocal asked
        asked += 1
        return running[_examine_choice(impl, running, copied=False)]

    scheduler = Scheduler(
        BlockAllocator(12, enable_prefix_caching=False),
        block_size=4,
        max_num_batched_tokens=24,
        max_num_seqs=8,
        max_model_len=48,
        victim_policy=policy,
    )
    left = 16
    while left or scheduler.has_unfinished:
        if left and rng.random() < 0.5:
            params = SamplingParams(max_tokens=rng.randint(8, 24), ignore_eos=True)
            scheduler.add(Request(f"r{left}", [1] * rng.randint(1, 20), params))
            left -= 1
        plan = scheduler.schedule()
        if plan is not None:
            scheduler.complete(plan, [[SampledToken(1)] * chunk.samples for chunk in plan.chunks])
    return asked


EXERCISES = (
    Exercise(
        name="engine.plan_chunks",
        notebook="05",
        reference=plan_chunks,
        check=check_plan_chunks,
        hints=(
            "Decodes come first: each takes one token of the budget, whatever happens. Prompts share only what "
            "is left, oldest first.",
            "Keep a running `room`, which starts at `budget - num_decodes`. Walk through `prefills` in order; "
            "each prompt takes what it needs or what there is, whichever is less, and `room` shrinks by that. "
            "Prompts that come too late still have an entry: 0.",
            "`count = min(remaining, room)`, `chunks.append(count)`, `room -= count`, for every `remaining` in "
            "`prefills`; return `chunks`.",
        ),
        plug=lambda parts, impl: replace(parts, chunk_policy=impl),
    ),
    Exercise(
        name="engine.choose_victim",
        notebook="05",
        reference=choose_victim,
        check=check_choose_victim,
        hints=(
            "Whoever loses its blocks has to compute its KV again. To whom should that never happen, so that "
            "at least one sequence is sure to get on, whatever else is going on?",
            "The oldest must be safe, and the youngest has been promised least. `sequence.priority` is a pair "
            "(order of admission, number of the sample); the larger, the younger.",
            "`max` takes a `key`: a function that says what to compare. Here that is `sequence.priority`.",
        ),
        plug=lambda parts, impl: replace(parts, victim_policy=impl),
    ),
)
