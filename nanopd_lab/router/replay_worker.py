"""A worker in thought: prompts in chunks of a step's budget, and outputs that all advance by a token a step."""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import NamedTuple

from nanopd_lab.cost.iteration import SHORT_CHUNK
from nanopd_lab.router.step_costs import StepCosts

MOST_TAKEN = 0.9  # of a worker's time, by prompts
# Of what prompts take in a replay, so much goes on behind it. Fitted: with all of it outputs that are kept seem lost.
MET = 0.5


class Room(NamedTuple):
    """What a worker holds at most: sequences, and tokens of KV."""

    max_num_seqs: int
    kv_tokens: float


class _Prompt:
    """One that is queued: `done` of its tokens are computed. No tokens of output: they will come elsewhere."""

    __slots__ = ("arrival", "done", "job", "output", "tokens")

    def __init__(self, job: int, arrival: float, tokens: int, output: int) -> None:
        self.job, self.arrival, self.tokens, self.output = job, arrival, tokens, output
        self.done = 0


class ReplayWorker:
    """See the module. Jobs are numbers; -1 is one that nobody asks about.

    Args:
        costs: of its steps
        room: for outputs; prompts find room
        firsts, ends: where it notes the times of first and last tokens, by job
        now: from when on it is free
    """

    def __init__(
        self, costs: StepCosts, room: Room, firsts: list[float], ends: list[float], now: float = 0.0
    ) -> None:
        self.costs, self.room, self.firsts, self.ends = costs, room, firsts, ends
        self.now, self.steps, self._token_s = now, 0.0, costs.token_s
        self.batch, self.context = 0, 0.0
        self.queue: deque[_Prompt] = deque()
        self._queued_tokens = 0
        self._decoding_since = 0.0  # when the first output began
        self._prompts_s = 0.0  # that prompts have taken since, from outputs
        self._begun = self._ended = -1.0  # the last step with prompts
        self._heap: list[tuple[float, int, float]] = []  # (step at which it ends, job, context then)
        self._waiting: deque[tuple[int, float, float]] = deque()

    @property
    def jobs(self) -> int:
        return len(self.queue) + self.batch + len(self._waiting)

    def queued_s(self, time: float) -> float:
        """About what a prompt that comes then waits for others."""
        left, queued_s = self.now - time, self._queued_tokens * self._token_s
        return left + queued_s if left > 0 else queued_s

    # ------------------------------------------------------------------ prompts

    def take(self, job: int, arrival: float, tokens: int, output: int) -> None:
        """A prompt comes; the worker has advanced to its arrival. Outputs that run wait for it only from the step on
        that is planned behind it."""
        if self.batch and not self.queue:
            self.run_until(arrival + self.costs.wait_steps * self.pace())
        self.queue.append(_Prompt(job, arrival, tokens, output))
        self._queued_tokens += tokens

    def advance(self, time: float) -> None:
        """Until then at least: a step with prompts is not divided."""
        while self.queue and self.now < time:
            self.chunk_step()
        if self.now < time < math.inf:
            self.run_until(time)

    def chunk_step(self) -> None:
        """One step with prompt chunks, beside whoever decodes."""
        queue, costs, begun, batch = self.queue, self.costs, self.now, self.batch
        # A step that is planned ahead is planned as the one before it begins.
        planned = self._begun if costs.wait_steps > 1 and self._ended == begun else begun
        left = costs.budget - batch
        chunks = tokens = read = 0
        pairs = short = 0.0
        for each in queue:
            if left <= 0 or (each.arrival > planned and (chunks or batch)):
                break
            past = each.done
            count = each.tokens - past
            if count > left:
                count = left
            each.done = reached = past + count
            left -= count
            chunks += 1
            tokens += count
            read += reached
            of_chunk = count * (past + count / 2)
            pairs += of_chunk
            if 1 < count < SHORT_CHUNK:
                short += of_chunk
        self._queued_tokens -= tokens
        if chunks:
            seconds = costs.step(batch, self.context, chunks, tokens, pairs, short, read)
        elif batch:
            seconds = self.pace()
        else:  # a budget that outputs have used up
            seconds = costs.mixed(0, self.context, [(queue[0].done, 1)])
            queue[0].done += 1
        self._begun = begun
        self.now = self._ended = begun + seconds
        self.steps += 1.0
        if batch:
            self._prompts_s += seconds - costs.decode(batch, self.context)
            self.context += batch
            while self._heap and self._heap[0][0] <= self.steps:
                self._end()
        while queue and queue[0].done >= queue[0].tokens:
            each = queue.popleft()
            self.firsts[each.job] = self.now
            if each.output:
                self.add(each.job, each.tokens + 1, each.output - 1)

    # ------------------------------------------------------------------ outputs

    def add(self, job: int, context: float, remaining: float) -> None:
        """A job whose KV is here; it waits if there is no room."""
        if self.batch and (
            self.batch >= self.room.max_num_seqs or self.context + context > self.room.kv_tokens
        ):
            self._waiting.append((job, context, remaining))
            return
        heapq.heappush(self._heap, (self.steps + remaining, job, context + remaining))
        if not self.batch and not self._prompts_s:
            self._decoding_since = self.now
        self.batch += 1
        self.context += context

    def pace(self) -> float:
        """Seconds a step, now."""
        return self.costs.decode(self.batch, self.context)

    def run_until(self, time: float) -> None:
        """Decode steps only."""
        heap, costs, now = self._heap, self.costs, self.now
        host_s, by_context, batches = costs.host_s, costs.context_s, costs.batches
        half = by_context / 2
        while heap and now < time:
            batch = self.batch
            pace = batches[batch] + by_context * self.context
            if pace < host_s:
                pace = host_s
            steps, left_s = heap[0][0] - self.steps, time - now
            most = left_s / pace
            pace += half * batch * (steps if steps < most else most)
            if steps * pace > left_s:
                steps = left_s / pace
                self.steps += steps
                self.context += steps * batch
                break
            self.steps += steps
            self.context += steps * batch
            now += steps * pace
            self.now = now
            self._end()
        self.now = max(now, time)

    def finish(self, beyond_s: float = 0.0, swell: float = 1.0) -> None:
        """The others go on at this pace; who waits follows who ends. For so many seconds more prompts take as much of
        the time as they have since the first output, or `swell` times as much."""
        now, pace = self.now, self.pace()
        free = 1.0 - min(MOST_TAKEN, swell * MET * self._prompts_s / max(now - self._decoding_since, 1e-9))
        slowed_s = max(0.0, beyond_s) * free  # of decoding, until no prompts come
        steps = [step for step, _, _ in self._heap]  # a heap as well
        last = [(step, job) for step, job, _ in self._heap]
        for job, _, remaining in self._waiting:
            step = heapq.heappop(steps) + remaining
            heapq.heappush(steps, step)
            last.append((step, job))
        for step, job in last:
            if job >= 0:
                left_s = (step - self.steps) * pace
                self.ends[job] = now + left_s + min(left_s, slowed_s) * (1.0 / free - 1.0)

    def _end(self) -> None:
        _, job, context = heapq.heappop(self._heap)
        self.batch -= 1
        self.context = max(0.0, self.context - context) if self.batch else 0.0
        if job >= 0:
            self.ends[job] = self.now
        while self._waiting and (
            not self.batch
            or (
                self.batch < self.room.max_num_seqs
                and self.context + self._waiting[0][1] <= self.room.kv_tokens
            )
        ):
            self.add(*self._waiting.popleft())
