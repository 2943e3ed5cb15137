"""Versions of the exercises on the scheduler."""

from __future__ import annotations

import copy

from tests.lab.wrong_versions.base import Version


def ignores_decodes(num_decodes, prefills, budget):
    chunks = []
    for remaining in prefills:
        chunks.append(min(remaining, budget))
        budget -= chunks[-1]
    return chunks


def takes_no_account(num_decodes, prefills, budget):
    return [min(remaining, budget - num_decodes) for remaining in prefills]


def whole_prompts_only(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    for remaining in prefills:
        chunks.append(remaining if remaining <= room else 0)
        room -= chunks[-1]
    return chunks


def shares_equally(num_decodes, prefills, budget):
    share = (budget - num_decodes) // max(1, len(prefills))
    return [min(remaining, share) for remaining in prefills]


def shortest_first(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, [0] * len(prefills)
    for index in sorted(range(len(prefills)), key=lambda index: prefills[index]):
        chunks[index] = min(prefills[index], room)
        room -= chunks[index]
    return chunks


def youngest_first(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    for remaining in reversed(prefills):
        chunks.insert(0, min(remaining, room))
        room -= chunks[0]
    return chunks


def overshoots(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    for remaining in prefills:
        chunks.append(remaining if room > 0 else 0)
        room -= remaining
    return chunks


def goes_negative(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    for remaining in prefills:
        chunks.append(min(remaining, room))
        room -= remaining
    return chunks


def stops_early(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    for remaining in prefills:
        if room <= 0:
            break
        chunks.append(min(remaining, room))
        room -= chunks[-1]
    return chunks


def keeps_one_back(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes - 1, []
    for remaining in prefills:
        chunks.append(max(0, min(remaining, room)))
        room -= chunks[-1]
    return chunks


def fills_only_the_first(num_decodes, prefills, budget):
    return [
        min(remaining, budget - num_decodes) if not index else 0 for index, remaining in enumerate(prefills)
    ]


def eats_its_input(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    while prefills:
        chunks.append(min(prefills.pop(0), room))
        room -= chunks[-1]
    return chunks


def whole_blocks(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    for remaining in prefills:
        count = min(remaining, room)
        chunks.append(count if count in (remaining, 0) or count < 16 else count // 16 * 16)
        room -= chunks[-1]
    return chunks


def at_most_1024(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    for remaining in prefills:
        chunks.append(min(remaining, room, 1024))
        room -= chunks[-1]
    return chunks


def a_tuple(num_decodes, prefills, budget):
    room, chunks = budget - num_decodes, []
    for remaining in prefills:
        chunks.append(min(remaining, room))
        room -= chunks[-1]
    return tuple(chunks)


def breaks_on_none(num_decodes, prefills, budget):
    first = min(prefills[0], budget - num_decodes)
    return [first, *(breaks_on_none(num_decodes + first, prefills[1:], budget) if prefills[1:] else [])]


_chunks = []


def into_one_list(num_decodes, prefills, budget):
    _chunks[:] = recursive(num_decodes, prefills, budget)
    return _chunks


def recursive(num_decodes, prefills, budget):
    if not prefills:
        return []
    first = min(prefills[0], budget - num_decodes)
    return [first, *recursive(num_decodes + first, prefills[1:], budget)]


def with_prefix_sums(num_decodes, prefills, budget, *, floor=0):
    room, before, chunks = budget - num_decodes, 0, []
    for remaining in prefills:
        chunks.append(min(remaining, max(floor, room - before)))
        before += remaining
    return chunks


def the_oldest(running):
    return running[0]


def the_oldest_by_priority(running):
    return min(running, key=lambda sequence: sequence.priority)


def by_sample_first(running):
    return max(running, key=lambda sequence: (sequence.index, sequence.request.serial))


def by_sum(running):
    return max(running, key=lambda sequence: sum(sequence.priority))


def single_samples_first(running):
    singles = [sequence for sequence in running if sequence.request.params.n == 1]
    return max(singles or running, key=lambda sequence: sequence.priority)


def only_with_blocks(running):
    holders = [sequence for sequence in running if sequence.blocks]
    return max(holders or running, key=lambda sequence: sequence.priority)


def spares_the_nearly_done(running):
    far = [s for s in running if s.output_len + 1 < s.request.params.max_tokens]
    return max(far or running, key=lambda sequence: sequence.priority)


def not_in_flight(running):
    idle = [sequence for sequence in running if not sequence.in_flight]
    return max(idle or running, key=lambda sequence: sequence.priority)


_victims = []


def never_twice(running):
    spared = [sequence for sequence in running if sequence not in _victims]
    _victims.append(max(spared or running, key=lambda sequence: sequence.priority))
    return _victims[-1]


def always_the_same(running):
    _victims[:] = [sequence for sequence in _victims if sequence in running]
    _victims.append(max(running, key=lambda sequence: sequence.priority))
    return _victims[0]


def most_blocks(running):
    return max(running, key=lambda sequence: len(sequence.blocks))


def fewest_blocks(running):
    return min(running, key=lambda sequence: len(sequence.blocks))


def most_blocks_but_never_the_oldest(running):
    return max(running[1:] or running, key=lambda sequence: len(sequence.blocks))


def latest_arrival(running):
    return max(running, key=lambda sequence: sequence.request.arrival)


def ignores_samples(running):
    return max(running, key=lambda sequence: sequence.request.serial)


def least_written(running):
    return min(running, key=lambda sequence: sequence.output_len)


def served_last(running):
    return max(running, key=lambda sequence: sequence.last_served)


def takes_turns(running):
    return min(running, key=lambda sequence: sequence.preemptions)


def by_name(running):
    return max(running, key=lambda sequence: sequence.request.request_id)


def last_but_one(running):
    return running[-2] if len(running) > 1 else running[0]


def an_index(running):
    return len(running) - 1


def a_request(running):
    return max(running, key=lambda sequence: sequence.priority).request


def a_copy(running):
    return copy.copy(running[-1])


def a_list(running):
    return sorted(running, key=lambda sequence: sequence.priority, reverse=True)[:1]


def takes_it_out(running):
    return running.pop()


def frees_it_itself(running):
    victim = running[-1]
    victim.blocks.clear()
    victim.num_computed = 0
    return victim


_calls = []


def tires(running):
    _calls.append(None)
    return running[-1] if len(_calls) < 100 else running[0]


def needs_two(running):
    _, *_, youngest = running
    return youngest


def sorts_in_place(running):
    running.sort(key=lambda sequence: sequence.priority, reverse=True)
    return running[0]


def the_last(running):
    return running[-1]


def by_loop(running):
    victim = None
    for sequence in running:
        if victim is None or sequence.priority > victim.priority:
            victim = sequence
    return victim


def by_sorting(running):
    return sorted(running, key=lambda sequence: (sequence.request.serial, sequence.index))[-1]


WRONG: dict[str, list[tuple[Version, str]]] = {
    "engine.plan_chunks": [
        (ignores_decodes, "more than the budget of 8"),
        (takes_no_account, "more than the budget of 8"),
        (whole_prompts_only, "1 token(s) of the budget stay empty"),
        (shares_equally, "first come, first served"),
        (shortest_first, "first come, first served"),
        (youngest_first, "first come, first served"),
        (overshoots, "more than the budget"),
        (goes_negative, "a prompt that gets nothing gets 0"),
        (stops_early, "so 3 count(s)"),
        (keeps_one_back, "1 token(s) of the budget stay empty"),
        (fills_only_the_first, "1 token(s) of the budget stay empty"),
        (eats_its_input, "the caller still needs prefills"),
        (whole_blocks, "prompt 1 still lacks 300 token(s)"),
        (at_most_1024, "token(s) of the budget stay empty"),
        (a_tuple, "return a list of ints"),
        (breaks_on_none, "IndexError"),
        (into_one_list, "make a new one in each call"),
    ],
    "engine.choose_victim": [
        (the_oldest, "the oldest always finishes"),
        (the_oldest_by_priority, "the oldest always finishes"),
        (by_sample_first, "the youngest, (3, 0), gives way"),
        (by_sum, "the youngest, (3, 0), gives way"),
        (single_samples_first, "gives way"),
        (only_with_blocks, "gives way"),
        (spares_the_nearly_done, "gives way"),
        (not_in_flight, "gives way"),
        (never_twice, "gives way"),
        (always_the_same, "gives way"),
        (most_blocks, "the youngest, (1, 0), gives way"),
        (fewest_blocks, "gives way"),
        (most_blocks_but_never_the_oldest, "gives way"),
        (latest_arrival, "the youngest, (1, 0), gives way"),
        (ignores_samples, "the youngest, (2, 2), gives way"),
        (least_written, "gives way"),
        (served_last, "gives way"),
        (takes_turns, "gives way"),
        (by_name, "gives way"),
        (last_but_one, "gives way"),
        (an_index, "not its index"),
        (a_request, "one of the sequences in `running` itself"),
        (a_copy, "one of the sequences in `running` itself"),
        (a_list, "one of the sequences in `running` itself"),
        (takes_it_out, "the caller still needs running"),
        (frees_it_itself, "the caller still needs running"),
        (tires, "the oldest always finishes"),
        (needs_two, "ValueError"),
        (sorts_in_place, "the caller still needs running"),
    ],
}

RIGHT: dict[str, list[Version]] = {
    "engine.plan_chunks": [recursive, with_prefix_sums],
    "engine.choose_victim": [by_loop, the_last, by_sorting],
}
