"""What if the workers had other roles? The arrivals of the last while are served again, by a few workers in thought.

Steps are those of the cost model; decodes run in fractions of steps, which is exact but for the step in which somebody
comes. Outputs that run there now go on, evenly divided. Of many workers of a role a few stand for all, with their share
of the arrivals. Two questions are asked apart and joined request by request:

    prefill workers: `first_tokens`    each new prompt where the fewest tokens wait, and the links
    decode workers:  `decode_times`    one of them
    mixed workers:   `mixed_times`     each new request where the fewest jobs are

All are generators that give back control after a few requests, so that a policy can think a little at a time.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import NamedTuple

from nanopd_lab.router.replay_worker import ReplayWorker, Room
from nanopd_lab.router.step_costs import StepCosts

# Of a decode worker, from when the KV could be there until its first step with it: 3.3 to 3.9 in busy simulations.
JOINING_STEPS = 3.5
SLICE = 4  # requests between two pauses
LINKS_BUSY = 0.5  # of the time, from which on pulls wait for each other for long
AGAIN = 4  # times that arrivals come again where links are busy


class ReplayJob(NamedTuple):
    """A request of the replay: `arrival` in s from its begin, tokens of its prompt and of its output."""

    arrival: float
    prompt_tokens: int
    output_tokens: int


class Running(NamedTuple):
    """An output under way: tokens in the cache, and tokens still to come."""

    context: float
    remaining: float


Thinking = Generator[None, None, "list[float]"]
Pairs = Generator[None, None, "list[tuple[float, float]]"]


def first_tokens(
    costs: StepCosts,
    jobs: Sequence[ReplayJob],
    backlogs_s: Sequence[float],
    leftovers: Sequence[Running],
    targets: int,
    latest_s: float,
) -> Pairs:
    """(time to first token, seconds from there until all KV is at the target) of each job.

    Args:
        backlogs_s: of each worker that prefills, what it has to do at first
        leftovers: outputs on each, from when it decoded too
        targets: workers that take turns in getting the KV; a pull needs both cards, so that others of either wait
        latest_s: who would get his first token later is not served: infinite times
    """
    firsts, ends = [math.inf] * len(jobs), [math.inf] * len(jobs)
    workers = [ReplayWorker(costs, Room(1 << 30, math.inf), firsts, ends, now) for now in backlogs_s]
    for worker in workers:
        for each in leftovers:
            worker.add(-1, each.context, each.remaining)
    sources = []
    for number, job in enumerate(jobs):
        time, best, least_s = job.arrival, workers[0], math.inf
        for worker in workers:
            if worker.now < time:
                worker.advance(time)
            queued_s = worker.queued_s(time)
            if queued_s < least_s:
                best, least_s = worker, queued_s
        sources.append(best)
        if least_s + costs.prompt(job.prompt_tokens) <= latest_s:
            best.take(number, time, job.prompt_tokens, 0)
        if number % SLICE == SLICE - 1:
            yield
    for worker in workers:
        worker.advance(math.inf)
    yield
    order = sorted(zip(firsts, range(len(jobs)), strict=True))
    span_s = (jobs[-1].arrival - jobs[0].arrival) * len(jobs) / max(1, len(jobs) - 1)
    sending, getting, turn = dict.fromkeys(workers, 0.0), [0.0] * max(1, targets), 0
    found = [(math.inf, 0.0)] * len(jobs)
    # A queue at links that are nearly full builds up over more prompts than these: then they come again and again.
    busy_s = sum(costs.pulls(job.prompt_tokens)[0] for job in jobs) / min(len(workers), len(getting))
    for turns in range(AGAIN if busy_s > LINKS_BUSY * span_s else 1):
        since = turns * span_s
        for first, number in order:
            if first < math.inf:
                whole, seen = costs.pulls(jobs[number].prompt_tokens)
                source, target = sources[number], turn % len(getting)
                moved = max(since + first + seen, max(sending[source], getting[target]) + whole)
                sending[source] = getting[target] = moved
                found[number] = first - jobs[number].arrival, moved - since - first
            turn += 1
        yield
    return found


def decode_times(
    costs: StepCosts,
    jobs: Sequence[ReplayJob],
    running: Sequence[Running],
    room: Room,
    others: int = 0,
    known: float = 1.0,
) -> Thinking:
    """Seconds from the arrival of each job's KV at one decode worker to its last token.

    `arrival` is when the KV is there. Who has not ended when the last one has come goes on at the pace of then. Who
    finds the worker busy waits for steps of it, unless there was an idle one among the others, which are busy as often.

    Args:
        others: decode workers
        known: the share of jobs whose worker is as busy as it was when it was chosen
    """
    found = [0.0] * len(jobs)
    worker = ReplayWorker(costs, room, [], found)
    for each in running:
        worker.add(-1, each.context, each.remaining)
    # Jobs that found it busy, and those of them that found all others busy too: every whole one is taken to wait.
    busy, all_busy = 1.0 if running else 0.5, 0.0
    for number, job in enumerate(jobs):
        worker.run_until(job.arrival)
        if worker.batch:
            busy += 1.0
            all_busy += 1.0 - known * (1.0 - (busy / (number + 2.0)) ** others)
            if all_busy >= 1.0:
                all_busy -= 1.0
                worker.run_until(job.arrival + JOINING_STEPS * worker.pace())
        worker.add(number, job.prompt_tokens + 1, job.output_tokens - 1)
        if number % SLICE == SLICE - 1:
            yield
    worker.finish()
    return [max(0.0, end - job.arrival) for end, job in zip(found, jobs, strict=True)]


def mixed_times(
    costs: StepCosts,
    jobs: Sequence[ReplayJob],
    backlogs_s: Sequence[float],
    running: Sequence[Running],
    room: Room,
    latest_s: float,
    going_s: float = 0.0,
    swell: float = 1.0,
) -> Pairs:
    """(time to first token, seconds from there to the last) of each job at so many workers that do both.

    Args:
        backlogs_s: of each worker, what prompts it has to compute at first
        running: on each
        going_s: requests go on coming for so long, from the first of `jobs`: outputs may last longer than these
        swell: so many times as many of them a second as in `jobs`
    """
    firsts, ends = [math.inf] * len(jobs), [math.inf] * len(jobs)
    fleet = [ReplayWorker(costs, room, firsts, ends, now) for now in backlogs_s]
    for worker in fleet:
        for each in running:
            worker.add(-1, each.context, each.remaining)
    for number, job in enumerate(jobs):
        time, best, fewest = job.arrival, fleet[0], math.inf
        for worker in fleet:
            if worker.now < time:
                worker.advance(time)
            jobs_there = worker.jobs
            if jobs_there < fewest:
                best, fewest = worker, jobs_there
        if best.queued_s(time) + costs.prompt(job.prompt_tokens) <= latest_s:
            best.take(number, time, job.prompt_tokens, job.output_tokens)
        if number % SLICE == SLICE - 1:
            yield
    beyond_s = going_s - jobs[-1].arrival if jobs else 0.0
    for worker in fleet:
        while worker.queue:
            worker.chunk_step()
            yield
        worker.finish(beyond_s, swell)
    return [
        (first - job.arrival, max(0.0, end - first) if first < math.inf else 0.0)
        for first, end, job in zip(firsts, ends, jobs, strict=True)
    ]
