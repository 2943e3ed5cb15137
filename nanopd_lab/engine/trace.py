"""Run an engine and write down what every step did, for figures and tables.

It only looks: it compares what the scheduler's sequences say before and after each step.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from nanopd_lab.core import SamplingParams, Sequence
from nanopd_lab.engine.engine import Engine, Prompt
from nanopd_lab.engine.outputs import RequestOutput


@dataclass(frozen=True)
class Work:
    """What one step did for one request: `tokens` of its prompt (prefill) or of its answer (decode)."""

    request: int
    phase: str
    tokens: int


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
    """One step. `start_s` counts from the first request's arrival; queues and blocks are as the step left them.

    `cached` are the blocks without an owner whose content can still be found (if the allocator shows them).
    """

    start_s: float
    seconds: float
    work: tuple[Work, ...]
    waiting: int
    running: int
    finished: int
    blocks_used: int
    tables: tuple[Table, ...] = ()
    cached: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A whole run: its steps, and the requests' outputs in the order of the prompts."""

    steps: tuple[StepRecord, ...]
    outputs: tuple[RequestOutput, ...]
    seconds: float
    num_blocks: int
    block_size: int

    @property
    def output_tokens(self) -> int:
        return sum(len(sample.token_ids) for output in self.outputs for sample in output.outputs)

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


def run_traced(
    engine: Engine,
    prompts: Seq[Prompt],
    params: SamplingParams | Seq[SamplingParams],
    *,
    one_at_a_time: bool = False,
) -> Trace:
    """Run all prompts to the end: all at once, or each only after the one before it has ended.

    `params` is one for all, or one for each.

    Either way every prompt has arrived at the start, so that the time spent queueing counts. The engine must
    be idle.
    """
    assert not engine.has_unfinished, "the engine has other requests under way"
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    start = engine.clock()
    steps: list[StepRecord] = []
    outputs: dict[int, RequestOutput] = {}
    groups = [[number] for number in range(len(prompts))] if one_at_a_time else [list(range(len(prompts)))]
    done_before = 0
    for group in groups:
        for number in group:
            engine.add_request(str(number), prompts[number], each[number], arrival_time=start)
        queued = len(prompts) - done_before - len(group)
        while engine.has_unfinished:
            step, ended = _step(engine, start, queued, len(outputs))
            steps.append(step)
            outputs |= ended
        done_before += len(group)
    return Trace(
        steps=tuple(steps),
        outputs=tuple(outputs[number] for number in range(len(prompts))),
        seconds=engine.clock() - start,
        num_blocks=engine.stats().blocks.num_blocks,
        block_size=engine.config.block_size,
    )


def _step(
    engine: Engine, start: float, queued: int, finished: int
) -> tuple[StepRecord, dict[int, RequestOutput]]:
    sequences = [*engine.scheduler.waiting, *engine.scheduler.running]
    before = [(s, s.tokens_computed, "decode" if s.is_decoding else "prefill") for s in sequences]
    began = engine.clock()
    ended = {int(output.request_id): output for output in engine.step() if output.finished}
    seconds = engine.clock() - began
    work = tuple(
        Work(int(s.request.request_id), phase, s.tokens_computed - computed)
        for s, computed, phase in before
        if s.tokens_computed > computed
    )
    stats = engine.stats()
    record = StepRecord(
        start_s=began - start,
        seconds=seconds,
        work=work,
        waiting=stats.waiting + queued,
        running=stats.running,
        finished=finished + len(ended),
        blocks_used=stats.blocks.used,
        tables=tuple(_table(sequence) for sequence in engine.scheduler.running),
        cached=tuple(getattr(engine.scheduler.allocator, "evictable", ())),
    )
    return record, ended


def _table(sequence: Sequence) -> Table:
    most = sequence.prompt_len + sequence.request.params.max_tokens
    return Table(
        int(sequence.request.request_id), sequence.index, tuple(sequence.blocks), sequence.num_computed, most
    )
