"""How long a step takes: what the simulator asks of a cost model, and two simple ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanopd_lab.cost.iteration import SHORT_CHUNK, IterationModel, StepFeatures
from nanopd_lab.sim.host import Progress


class StepTime(Protocol):
    """Seconds of engine steps.

    It may have a method `decode_run(batch, total_context)` as well, which returns a function: from a number of steps to
    the time of so many decode steps of `batch` sequences, whose contexts (the `start` of their chunks) add up to
    `total_context` in the first step and to `batch` more in each that follows. A run then costs the simulator as much
    as a step. And a method
    `mixed_seconds(batch, total_context, chunks)`: the time of one step that does both, `batch` decodes and the chunks.
    """

    def seconds(self, chunks: Sequence[tuple[int, int]]) -> float:
        """Of one step that computes tokens `[start, start + count)` of a sequence for each `(start, count)`."""
        ...


@dataclass(frozen=True)
class ConstantTime:
    """Every step takes `step_s`."""

    step_s: float

    def seconds(self, chunks: Sequence[tuple[int, int]]) -> float:
        """See `StepTime`."""
        return self.step_s

    def decode_run(self, batch: int, total_context: int) -> Callable[[int], float]:
        """See `StepTime`."""
        return lambda steps: self.step_s * steps

    def mixed_seconds(self, batch: int, total_context: int, chunks: Sequence[tuple[int, int]]) -> float:
        """See `StepTime`."""
        return self.step_s


@dataclass(frozen=True)
class LinearTime:
    """`base_s + token_s * tokens + context_s * sum of (start + count) + sequence_s * sequences`.

    The form of DistServe's fits (Zhong et al., OSDI 2024), for prefill and decode alike.
    """

    base_s: float
    token_s: float = 0.0
    context_s: float = 0.0
    sequence_s: float = 0.0

    def seconds(self, chunks: Sequence[tuple[int, int]]) -> float:
        """See `StepTime`."""
        tokens = sum([count for _, count in chunks])
        context = sum([start for start, _ in chunks]) + tokens
        return self._step(len(chunks), tokens, context)

    def decode_run(self, batch: int, total_context: int) -> Callable[[int], float]:
        """See `StepTime`; an arithmetic series."""
        first, growth = self._step(batch, batch, total_context + batch), self.context_s * batch
        return lambda steps: steps * first + growth * (steps * (steps - 1) // 2)

    def mixed_seconds(self, batch: int, total_context: int, chunks: Sequence[tuple[int, int]]) -> float:
        """See `StepTime`."""
        tokens = batch + sum([count for _, count in chunks])
        context = total_context + sum([start for start, _ in chunks]) + tokens
        return self._step(batch + len(chunks), tokens, context)

    def _step(self, sequences: int, tokens: int, context: int) -> float:
        return (
            self.base_s
            + self.token_s * tokens
            + self.context_s * context
            + self.sequence_s * sequences  # of each
        )


class CostTime:
    """A fitted or assumed `IterationModel` as the simulator asks it.

    Every chunk counts as drawing a token; that a middle of a prompt does not saves at most the vocabulary projection.
    """

    def __init__(self, model: IterationModel) -> None:
        self.model = model
        self.decode_run = model.decode_run

    def seconds(self, chunks: Sequence[tuple[int, int]]) -> float:
        """See `StepTime`."""
        return self.mixed_seconds(0, 0, chunks)

    def mixed_seconds(self, batch: int, total_context: int, chunks: Sequence[tuple[int, int]]) -> float:
        """See `StepTime`."""
        tokens, context, pairs, short = batch, total_context + batch, total_context + batch / 2, 0.0
        read = 0  # of short chunks
        for start, count in chunks:
            of_chunk = count * (start + count / 2)
            tokens += count
            context += start + count
            pairs += of_chunk
            if 1 < count < SHORT_CHUNK:
                short += of_chunk
                read += start + count
        sequences = batch + len(chunks)
        if sequences == 1:
            read = 0
        return self.model.of_features(StepFeatures(tokens, sequences, pairs, context, sequences, short, read))


class RunClock:
    """When the steps of a run of decode steps end.

    Args:
        time: the cost model
        start: when the first step begins, s
        batch: sequences
        total_context: tokens that they have in the cache before it, all together
        contexts: makes a list of those of each
    """

    def __init__(
        self,
        time: StepTime,
        start: float,
        batch: int,
        total_context: int,
        contexts: Callable[[], Sequence[int]],
    ) -> None:
        self.start = self._begin = start
        self._progress: Progress | None = None
        self._seconds: Callable[[int], float] | None = None  # of so many steps
        if (decode_run := getattr(time, "decode_run", None)) is not None:
            self._seconds = decode_run(batch, total_context)
        else:
            self._time, self._contexts = time, contexts()
            self._ends = [start]  # as far as somebody has asked

    def paced_by(self, progress: Progress) -> None:
        """Take the times so far for work, from 0 on, that gets done like this."""
        self.start, self._progress = progress.began, progress

    def end(self, steps: int) -> float:
        """When so many steps are over; `end(0)` is the start."""
        seconds = self._seconds
        end = self._added_up(steps) if seconds is None else self._begin + seconds(steps)
        return end if self._progress is None else self._progress.when(end)

    def _added_up(self, steps: int) -> float:
        ends = self._ends
        while len(ends) <= steps:
            done = len(ends) - 1
            ends.append(ends[-1] + self._time.seconds([(context + done, 1) for context in self._contexts]))
        return ends[steps]

    def count(self, most: int, now: float, inclusive: bool) -> int:
        """How many steps are over at `now`, of `most` of which the last one is not. `inclusive`: those too that end
        just then."""
        if most == 1:
            return 0
        # The answer lies in between; steps are nearly alike, so a guess is nearly right.
        low, high, reach, start = 0, most - 1, 1, self.start
        guess = int((now - start) / (self.end(1) - start)) if self._seconds is not None else 0
        while low < high:
            middle = min(max(guess, low + 1), high)
            end = self.end(middle)
            if end < now or (inclusive and end == now):
                low, guess = middle, middle + reach
            else:
                high, guess = middle - 1, middle - reach
            reach *= 4
            if reach > 1 << 10:
                guess = (low + high + 1) // 2
        return low
