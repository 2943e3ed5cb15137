"""What if the workers had other roles? The arrivals of the last while are served again, by a few workers in thought.

Workers of one role are alike, so that one stands for all of its role, and gets its share of the arrivals. Outputs that
run there now go on, evenly divided. Steps are those of the cost model; decodes run in fractions of steps, which is
exact but for the step in which somebody comes. Two questions are asked apart and joined request by request:

    prefill workers: `first_tokens`    one queue before x workers, and their links
    decode workers:  `decode_times`    processor sharing
    mixed workers:   `mixed_times`     both, with prompts in chunks beside the decodes

All are generators that give back control after a few requests, so that a policy can think a little at a time.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.cost.iteration import SHORT_CHUNK, StepFeatures

if TYPE_CHECKING:
    from nanopd_lab.router.outlook import Outlook

# Of a decode worker, from when the KV could be there until its first step with it: 3.3 to 3.9 in busy simulations.
JOINING_STEPS = 3.5
SLICE = 4  # requests between two pauses


class ReplayJob(NamedTuple):
    """A request of the replay: `arrival` in s from its begin, tokens of its prompt and of its output."""

    arrival: float
    prompt_tokens: int
    output_tokens: int


class Running(NamedTuple):
    """An output under way: tokens in the cache, and tokens still to come."""

    context: float
    remaining: float


class Room(NamedTuple):
    """What a worker holds at most: sequences, and tokens of KV."""

    max_num_seqs: int
    kv_tokens: float


class StepCosts:
    """Seconds of steps and prompts by the outlook's cost model; what is asked again is remembered."""

    def __init__(self, outlook: Outlook) -> None:
        self.model = outlook.iteration
        self.budget = outlook.max_num_batched_tokens
        self.transfer = outlook.transfer
        self.block_bytes, self.block_size = outlook.block_bytes, outlook.block_size
        self.wait_steps = 1.5 if outlook.ahead else 0.5  # until a step takes in who comes while others run
        self.context_s = self.model.pair_s + self.model.context_s
        self._prompts: dict[int, float] = {}
        self._beside: dict[tuple[int, int], float] = {}
        self._batches: dict[int, float] = {}
        self._pulls: dict[int, tuple[float, float]] = {}
        self._steps: dict[tuple[int, int], float] = {}
        self.rest_s = self.prompt(self.budget) / 2  # of a full step

    def decode(self, batch: int, context: float) -> float:
        """One decode step of `batch` sequences with `context` tokens together."""
        fixed = self._batches.get(batch)
        if fixed is None:
            fixed = self._batches[batch] = self.model.decode_run(batch, 0)(1) if batch else 0.0
        return max(self.model.host_s, fixed + self.context_s * context)

    def mixed(self, batch: int, context: float, chunks: Sequence[tuple[int, int]]) -> float:
        """One step of `batch` decodes and chunks of (past, count) tokens; the products' share in steps of 16 tokens."""
        model = self.model
        tokens, pairs, short, read = batch, batch / 2, 0.0, batch
        for past, count in chunks:
            of_chunk = count * (past + count / 2)
            tokens += count
            read += past + count
            pairs += of_chunk
            if 1 < count < SHORT_CHUNK:
                short += of_chunk
        sequences = batch + len(chunks)
        key = (tokens + 15) // 16, (sequences + 7) // 8
        fixed = self._steps.get(key)
        if fixed is None:
            fixed = self._steps[key] = model.device_seconds(
                StepFeatures(16 * key[0], 8 * key[1], 0.0, 0, 8 * key[1] if tokens > 8 * key[1] else 0)
            )
        fixed += model.pair_s * pairs + model.short_pair_s * short + model.context_s * read
        return max(model.host_s, fixed + self.context_s * context)

    def prompt(self, tokens: int) -> float:
        """A prompt alone on its worker, chunk by chunk."""
        found = self._prompts.get(tokens)
        if found is None:
            if len(self._prompts) > 1 << 14:
                self._prompts.clear()
            found = self._prompts[tokens] = self._walk(tokens, 0)
        return found

    def beside(self, tokens: int, batch: int) -> float:
        """What a prompt adds to the steps of `batch` decodes, s; in steps of sizes, as it is asked often."""
        key = -(-tokens // 32), -(-batch // 8)
        found = self._beside.get(key)
        if found is None:
            tokens, batch = 32 * key[0], 8 * key[1]
            steps = -(-tokens // max(1, self.budget - batch))
            found = self._walk(tokens, batch) - steps * self.decode(batch, 0)
            self._beside[key] = found = max(found, 0.0)
        return found

    def _walk(self, tokens: int, batch: int) -> float:
        room = max(1, self.budget - batch)
        seconds, past = 0.0, 0
        while past < tokens:
            count = min(room, tokens - past)
            seconds += self.mixed(batch, 0, [(past, count)])
            past += count
        return seconds

    def pull(self, tokens: int) -> float:
        """The whole KV of a prompt, over an idle link."""
        if self.transfer is None:
            return 0.0
        blocks = -(-tokens // self.block_size)
        return self.transfer.seconds(blocks, blocks * self.block_bytes)

    def pulls(self, tokens: int) -> tuple[float, float]:
        """(of the whole KV, of what can be seen of it) of a prompt."""
        found = self._pulls.get(tokens)
        if found is None:
            if len(self._pulls) > 1 << 14:
                self._pulls.clear()
            found = self._pulls[tokens] = self.pull(tokens), self.last_pull(tokens)
        return found

    def last_pull(self, tokens: int) -> float:
        """What of it can be seen: chunks before the last are pulled while the next is computed."""
        return self.pull(tokens - (tokens - 1) // self.budget * self.budget)


Thinking = Generator[None, None, "list[float]"]


def first_tokens(
    costs: StepCosts, jobs: Sequence[ReplayJob], backlogs_s: Sequence[float], cards: int, latest_s: float
) -> Generator[None, None, list[tuple[float, float]]]:
    """(time to first token, seconds from there until all KV is at the target) of each job.

    Args:
        backlogs_s: of each worker that prefills, what it has to do at first
        cards: pairs of source and target that can move KV at once
        latest_s: who would get his first token later is not served: infinite times
    """
    free = sorted(backlogs_s)
    links = [0.0] * max(1, cards)
    found = []
    prompt_s, pulls, rest_s = costs.prompt, costs.pulls, costs.rest_s
    for number, (arrival, tokens, _) in enumerate(jobs):
        done = free[0]
        late_s = rest_s
        if done < arrival:
            done, late_s = arrival, 0.0
        done += prompt_s(tokens)
        if number % 16 == 15:
            yield
        if done + late_s - arrival > latest_s:
            found.append((math.inf, 0.0))
            continue
        heapq.heapreplace(free, done)
        done += late_s
        whole, seen = pulls(tokens)
        moved = max(done + seen, links[0] + whole)
        heapq.heapreplace(links, moved)
        found.append((done - arrival, moved - done))
    return found


def decode_times(
    costs: StepCosts, jobs: Sequence[ReplayJob], running: Sequence[Running], room: Room
) -> Thinking:
    """Seconds from the arrival of each job's KV at one decode worker to its last token.

    `arrival` is when the KV is there. Who has not ended when the last one has come goes on at the pace of then.
    """
    worker = _Decodes(costs, room)
    for each in running:
        worker.add(-1, each.context, each.remaining)
    found = [0.0] * len(jobs)
    for number, job in enumerate(jobs):
        worker.run_until(job.arrival, found)
        if worker.batch:
            worker.run_until(job.arrival + JOINING_STEPS * worker.pace(), found)
        worker.add(number, job.prompt_tokens + 1, job.output_tokens - 1)
        if number % SLICE == SLICE - 1:
            yield
    worker.finish(found)
    return [max(0.0, end - job.arrival) for end, job in zip(found, jobs, strict=True)]


def mixed_times(
    costs: StepCosts,
    jobs: Sequence[ReplayJob],
    running: Sequence[Running],
    room: Room,
    backlog_s: float,
    latest_s: float,
) -> Generator[None, None, list[tuple[float, float]]]:
    """(time to first token, seconds from there to the last) of each job at one worker that does both."""
    worker = _Decodes(costs, room)
    for each in running:
        worker.add(-1, each.context, each.remaining)
    ends, firsts = [0.0] * len(jobs), [0.0] * len(jobs)
    queue: deque[list[int]] = deque()  # [job, tokens done]
    worker.now = 0.0
    blocked_until = backlog_s
    for number, job in enumerate(jobs):
        while queue and worker.now < job.arrival:
            _chunk_step(costs, worker, queue, jobs, firsts, ends)
            yield
        if worker.now < job.arrival:
            worker.run_until(job.arrival, ends)
            if worker.batch:  # the step under way, and the one planned already
                worker.run_until(job.arrival + costs.wait_steps * worker.pace(), ends)
        if blocked_until > worker.now:
            worker.now = blocked_until
        ahead_s = sum([costs.prompt(jobs[entry[0]].prompt_tokens) for entry in queue])
        if worker.now - job.arrival + ahead_s + costs.prompt(job.prompt_tokens) > latest_s:
            firsts[number] = ends[number] = math.inf
        else:
            queue.append([number, 0])
    while queue:
        _chunk_step(costs, worker, queue, jobs, firsts, ends)
        yield
    worker.finish(ends)
    return [
        (first - job.arrival, max(0.0, end - first) if first < math.inf else 0.0)
        for first, end, job in zip(firsts, ends, jobs, strict=True)
    ]


def _chunk_step(
    costs: StepCosts,
    worker: _Decodes,
    queue: deque[list[int]],
    jobs: Sequence[ReplayJob],
    firsts: list[float],
    ends: list[float],
) -> None:
    """One step with prompt chunks, beside whoever decodes."""
    left = max(1, costs.budget - worker.batch)
    chunks = []
    for entry in queue:
        count = min(left, jobs[entry[0]].prompt_tokens - entry[1])
        chunks.append((entry[1], count))
        entry[1] += count
        left -= count
        if left <= 0:
            break
    worker.step(costs.mixed(worker.batch, worker.context, chunks), ends)
    while queue and queue[0][1] >= jobs[queue[0][0]].prompt_tokens:
        number = queue.popleft()[0]
        firsts[number] = worker.now
        worker.add(number, jobs[number].prompt_tokens + 1, jobs[number].output_tokens - 1)


class _Decodes:
    """Outputs that one worker computes: all advance by a token a step, in fractions of steps."""

    def __init__(self, costs: StepCosts, room: Room) -> None:
        self.costs, self.room = costs, room
        self.now = self.steps = 0.0
        self.batch, self.context = 0, 0.0
        self._heap: list[tuple[float, int, float]] = []  # (step at which it ends, job, context then)
        self._waiting: deque[tuple[int, float, float]] = deque()

    def add(self, job: int, context: float, remaining: float) -> None:
        """A job whose KV is here; it waits if there is no room."""
        if self.batch and (
            self.batch >= self.room.max_num_seqs or self.context + context > self.room.kv_tokens
        ):
            self._waiting.append((job, context, remaining))
            return
        heapq.heappush(self._heap, (self.steps + remaining, job, context + remaining))
        self.batch += 1
        self.context += context

    def pace(self) -> float:
        """Seconds a step, now."""
        return self.costs.decode(self.batch, self.context)

    def run_until(self, time: float, ends: list[float]) -> None:
        """Decode steps only."""
        heap, costs, now = self._heap, self.costs, self.now
        half, pace_of = costs.context_s / 2, costs.decode
        while heap and now < time:
            batch = self.batch
            pace = pace_of(batch, self.context)
            steps = heap[0][0] - self.steps
            most = (time - now) / pace
            pace += half * batch * (steps if steps < most else most)
            if steps * pace > time - now:
                steps = (time - now) / pace
                self.steps += steps
                self.context += steps * batch
                break
            self.steps += steps
            self.context += steps * batch
            now += steps * pace
            self.now = now
            self._end(ends)
        self.now = max(now, time)

    def step(self, seconds: float, ends: list[float]) -> None:
        """One step, which took so long."""
        self.now += seconds
        self.steps += 1.0
        self.context += self.batch
        while self._heap and self._heap[0][0] <= self.steps:
            self._end(ends)

    def finish(self, ends: list[float]) -> None:
        """The others go on at this pace."""
        pace = self.pace()
        for step, job, _ in self._heap:
            if job >= 0:
                ends[job] = self.now + (step - self.steps) * pace
        for job, _, remaining in self._waiting:
            if job >= 0:
                ends[job] = self.now + 2 * remaining * pace  # one that has room ends first

    def _end(self, ends: list[float]) -> None:
        _, job, context = heapq.heappop(self._heap)
        self.batch -= 1
        self.context = max(0.0, self.context - context) if self.batch else 0.0
        if job >= 0:
            ends[job] = self.now
        while self._waiting and (
            not self.batch
            or (
                self.batch < self.room.max_num_seqs
                and self.context + self._waiting[0][1] <= self.room.kv_tokens
            )
        ):
            self.add(*self._waiting.popleft())


def share(value: float, objective: float, width: float = 0.1) -> float:
    """How surely `value` keeps an objective: 1 well below, 0 well above, a straight line between."""
    if objective == math.inf:
        return 1.0
    return min(1.0, max(0.0, 0.5 + (1.0 - value / objective) / (2 * width)))
