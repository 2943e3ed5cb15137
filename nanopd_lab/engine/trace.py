"""Run an engine and write down what every step did, for figures and tables.

It only looks: it compares what the scheduler's sequences say before and after each step.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from nanopd_lab.core import SamplingParams, Sequence
from nanopd_lab.engine.engine import Engine
from nanopd_lab.engine.outputs import RequestOutput
from nanopd_lab.engine.prompts import Prompt


@dataclass(frozen=True)
class Work:
    """What one step did for one request: `tokens` of its prompt (prefill) or of its answer (decode).

    `past` tokens had their KV in the cache already. `sampled` says whether a token of the answer came out. After
    a preemption the answer's tokens are computed again together with the prompt's, as prefill.
    """

    request: int
    phase: str
    tokens: int
    past: int = 0
    sampled: bool = False


@dataclass(frozen=True)
class Table:
    """One sequence's memory: its blocks in order, the tokens in them, and the most that it may ever hold."""

    request: int
    sample: int
    blocks: tuple[int, ...]
    tokens: int
    most_tokens: int


@dataclass(frozen=True)
class StepRecord:
    """One step. `start_s` counts from the start of the run; queues and blocks are as the step left them.

    `preempted` are the requests that lost their blocks when the step was planned; `cached` are the blocks without an
    owner whose content can still be found (if the allocator shows them).
    """

    start_s: float
    seconds: float
    work: tuple[Work, ...]
    waiting: int
    running: int
    finished: int
    blocks_used: int
    preempted: tuple[int, ...] = ()
    tables: tuple[Table, ...] = ()
    cached: tuple[int, ...] = ()

    @property
    def end_s(self) -> float:
        return self.start_s + self.seconds


@dataclass(frozen=True)
class Trace:
    """A whole run: its steps, and the requests' outputs and arrivals in the order of the prompts."""

    steps: tuple[StepRecord, ...]
    outputs: tuple[RequestOutput, ...]
    seconds: float
    num_blocks: int
    block_size: int
    arrivals_s: tuple[float, ...] = ()

    @property
    def output_tokens(self) -> int:
        return sum(len(sample.token_ids) for output in self.outputs for sample in output.outputs)

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds

    def token_times_s(self, request: int) -> list[float]:
        """When each token of a request's answer appeared, in seconds from the start of the run."""
        return [s.end_s for s in self.steps for w in s.work if w.request == request and w.sampled]

    def itl_s(self, request: int) -> list[float]:
        """Inter-token latencies of a request: the gap before each token but the first, in seconds."""
        times = self.token_times_s(request)
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    def gaps_while_reading_s(self, newcomer: int, readers: Seq[int]) -> list[float]:
        """Gaps before those tokens of `readers` that came between the newcomer's arrival and its first token."""
        begin, end = self.arrivals_s[newcomer], self.token_times_s(newcomer)[0]
        return [
            gap
            for reader in readers
            for time, gap in zip(self.token_times_s(reader)[1:], self.itl_s(reader), strict=True)
            if begin < time <= end
        ]


def run_traced(
    engine: Engine,
    prompts: Seq[Prompt],
    params: SamplingParams | Seq[SamplingParams],
    *,
    one_at_a_time: bool = False,
    static_batch: int | None = None,
    after_steps: Seq[int] | None = None,
) -> Trace:
    """Run all prompts to the end. The engine must be idle.

    Args:
        params: for all requests, or one for each
        static_batch: so many at a time, and the next ones only when all of those have ended, as servers did
            before continuous batching
        one_at_a_time: the same as `static_batch=1`
        after_steps: for each request, the number of steps after which it arrives; all at the start if None.
            (With a static batch all have arrived at the start, so that the time spent queueing counts.)
    """
    assert not engine.has_unfinished, "the engine has other requests under way"
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    assert len(each) == len(prompts), f"{len(each)} sampling parameters for {len(prompts)} prompts"
    batch = 1 if one_at_a_time else static_batch
    due = list(after_steps or [0] * len(prompts))
    outside = deque(sorted(range(len(prompts)), key=lambda number: due[number]))
    # A step is what is recorded, so each is completed before the next is planned.
    ahead, engine.loop.ahead = engine.loop.ahead, False
    start = engine.clock()
    steps: list[StepRecord] = []
    outputs: dict[int, RequestOutput] = {}
    arrivals: dict[int, float] = {}

    def submit() -> None:
        number = outside.popleft()
        arrivals[number] = start if after_steps is None else engine.clock()
        engine.add_request(str(number), prompts[number], each[number], arrival_time=arrivals[number])

    while outside or engine.has_unfinished:
        if batch is not None:
            for _ in range(0 if engine.has_unfinished else min(batch, len(outside))):
                submit()
        while batch is None and outside and (due[outside[0]] <= len(steps) or not engine.has_unfinished):
            submit()
        queued = len(outside) if after_steps is None else 0
        step, ended = _step(engine, start, queued, len(outputs))
        steps.append(step)
        outputs |= ended
    engine.loop.ahead = ahead
    return Trace(
        steps=tuple(steps),
        outputs=tuple(outputs[number] for number in range(len(prompts))),
        seconds=engine.clock() - start,
        num_blocks=engine.stats().blocks.num_blocks,
        block_size=engine.config.block_size,
        arrivals_s=tuple(arrivals[number] - start for number in range(len(prompts))),
    )


def _step(
    engine: Engine, start: float, queued: int, finished: int
) -> tuple[StepRecord, dict[int, RequestOutput]]:
    sequences = [*engine.scheduler.waiting, *engine.scheduler.running]
    before = [
        (s, s.tokens_computed, len(s.tokens), s.preemptions, "decode" if s.is_decoding else "prefill")
        for s in sequences
    ]
    began = engine.clock()
    ended = {int(output.request_id): output for output in engine.step() if output.finished}
    seconds = engine.clock() - began
    work = []
    for s, computed, length, _, phase in before:
        if count := s.tokens_computed - computed:
            sampled = len(s.tokens) > length
            # A sequence that has ended no longer says how far it was computed: to its last known token.
            past = (length if sampled else s.num_computed) - count
            work.append(Work(int(s.request.request_id), phase, count, past, sampled))
    preempted = tuple(int(s.request.request_id) for s, _, _, times, _ in before if s.preemptions > times)
    stats = engine.stats()
    record = StepRecord(
        start_s=began - start,
        seconds=seconds,
        work=tuple(work),
        waiting=stats.waiting + queued,
        running=stats.running,
        finished=finished + len(ended),
        blocks_used=stats.blocks.used,
        preempted=preempted,
        tables=tuple(_table(sequence) for sequence in engine.scheduler.running),
        cached=tuple(getattr(engine.scheduler.allocator, "evictable", ())),
    )
    return record, ended


def _table(sequence: Sequence) -> Table:
    most = sequence.prompt_len + sequence.request.params.max_tokens
    return Table(
        int(sequence.request.request_id), sequence.index, tuple(sequence.blocks), sequence.num_computed, most
    )
