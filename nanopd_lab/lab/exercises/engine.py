"""Exercises on the scheduler."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from nanopd_lab.engine.policies import ChunkPolicy, plan_chunks
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
)
