"""From the controller's events to what the caller sees: tokens, text, times and accounts of each request.

    Emit ──► sample: tokens, text up to a stop string ──┐
    Settled ──► accounts ───────────────────────────────┴─► new since the last look ──► ClusterOutput

A stop string is seen here only, as only here there is text; the controller is told. Outputs are made when somebody
looks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from nanopd_lab.cluster.accounts import PathReport
from nanopd_lab.cluster.actions import Action, Emit, Settled
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.core import FinishReason, Logprob, SamplingParams
from nanopd_lab.engine.detokenizer import Detokenizer
from nanopd_lab.engine.outputs import CompletionOutput, RequestMetrics, spelled
from nanopd_lab.errors import InvalidRequestError

Finish = Callable[[str, int, FinishReason, float, str], None]
"""Called with a request's id, a sample's index, why and when it ends, and the stop string."""


@dataclass(eq=False)
class _Sample:
    index: int
    text: Detokenizer | None
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative: float = 0.0
    finish: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def read(self, event: Emit, now: float) -> str | None:
        """Take in what came; returns the stop string that ends the sample before the controller knows."""
        stopped = None
        for number, token in enumerate(event.tokens):
            self.tokens.append(token.token)
            self.times.append(now)
            self.cumulative += token.logprob
            if token.top_logprobs is not None:
                self.logprobs.append(token.top_logprobs)
            # A stop token is part of token_ids but not of the text.
            ends = event.finish_reason is FinishReason.STOP and number == len(event.tokens) - 1
            if self.text and not ends:
                stopped = self.text.push(token.token)
                if stopped:
                    break
        if self.text and event.finish_reason is not None and not stopped:
            stopped = self.text.end()
        if stopped:
            self.finish, self.stop_reason = FinishReason.STOP, stopped
            return stopped if event.finish_reason is None else None
        self.finish, self.stop_reason, self.error = event.finish_reason, event.stop_reason, event.error
        return None

    def completion(self, with_logprobs: bool, tokenizer: Any) -> CompletionOutput:
        """As the caller sees it."""
        return CompletionOutput(
            index=self.index,
            text=self.text.text if self.text else "",
            token_ids=list(self.tokens),
            cumulative_logprob=self.cumulative if with_logprobs else None,
            logprobs=spelled(self.logprobs, tokenizer) if with_logprobs else None,
            finish_reason=str(self.finish) if self.finish else None,
            stop_reason=self.stop_reason,
            error=self.error,
            token_times=self.times,
        )


@dataclass(eq=False)
class _Tracked:
    request_id: str
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    metrics: RequestMetrics
    samples: list[_Sample]
    paths: dict[int, PathReport] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return all(sample.finish is not None for sample in self.samples)

    @property
    def settled(self) -> bool:
        return len(self.paths) == len(self.samples)

    def read(self, event: Emit, now: float) -> str | None:
        """As `_Sample.read`, with the request's times."""
        sample = self.samples[event.index]
        if sample.finish is not None:
            return None  # ended at a stop string, before the controller knew
        if event.tokens and self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
        stopped = sample.read(event, now)
        if self.finished and self.metrics.finished_time is None:
            self.metrics.finished_time = now
        return stopped

    def output(self, tokenizer: Any) -> ClusterOutput:
        """As the caller sees it."""
        metrics = self.metrics
        paths = [self.paths[index] for index in sorted(self.paths)]
        metrics.num_computed_tokens = sum(path.computed_tokens for path in paths)
        metrics.num_cached_tokens = sum(path.cached_tokens for path in paths)
        scheduled = [a.prefill.scheduled for path in paths for a in path.attempts if a.prefill]
        metrics.first_scheduled_time = min((each for each in scheduled if each is not None), default=None)
        with_logprobs = self.params.logprobs is not None
        return ClusterOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_ids,
            outputs=[sample.completion(with_logprobs, tokenizer) for sample in self.samples],
            finished=self.finished,
            metrics=metrics,
            paths=paths if self.settled else [],
        )


class RequestBook:
    """Requests that have not settled, and what is new of them since somebody last looked. See the module.

    Args:
        tokenizer: None where there is no text
        finish: ends a sample; the controller's
    """

    def __init__(self, tokenizer: Any, finish: Finish) -> None:
        self.tokenizer = tokenizer
        self._finish = finish
        self._tracked: dict[str, _Tracked] = {}
        self._fresh: dict[str, _Tracked] = {}
        self._watchers: list[deque[ClusterOutput]] = []

    def __len__(self) -> int:
        return len(self._tracked)

    def open(self, name: str, prompt: str | None, ids: list[int], params: SamplingParams, now: float) -> None:
        """Expect a request's events.

        Raises:
            InvalidRequestError: there is one of this name.
        """
        if name in self._tracked:
            raise InvalidRequestError(f"request id {name!r} is already in use")
        samples = [_Sample(index, self._reader(ids, params)) for index in range(params.n)]
        self._tracked[name] = _Tracked(name, prompt, ids, params, RequestMetrics(now), samples)

    def _reader(self, ids: list[int], params: SamplingParams) -> Detokenizer | None:
        if self.tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(
            self.tokenizer,
            ids,
            params.stop_strings,
            params.include_stop_str_in_output,
            params.min_tokens,
        )

    def forget(self, name: str) -> None:
        """Expect nothing more of a request."""
        self._tracked.pop(name, None)

    def take(self, events: Iterable[Action], now: float) -> bool:
        """Take in what the controller has for callers; True if that is news of a request."""
        touched: dict[str, _Tracked] = {}
        for event in events:
            if not isinstance(event, (Emit, Settled)):
                continue
            tracked = self._tracked.get(event.request_id)
            if tracked is None:
                continue
            touched[event.request_id] = tracked
            if isinstance(event, Settled):
                tracked.paths[event.index] = event.path
            elif stopped := tracked.read(event, now):
                self._finish(event.request_id, event.index, FinishReason.STOP, now, stopped)
        self._fresh |= touched
        for name, tracked in touched.items():
            if tracked.settled:
                self.forget(name)
                for watcher in self._watchers:
                    watcher.append(tracked.output(self.tokenizer))
        return bool(touched)

    def news(self, wanted: Container[str] | None = None) -> list[str]:
        """Requests with something new, only of these if any are named."""
        return [name for name in self._fresh if wanted is None or name in wanted]

    def lost(self, names: set[str]) -> set[str]:
        """Those of which nothing new will come: they are not under way, and all of them has been read."""
        return names - self._tracked.keys() - self._fresh.keys()

    def read(self, names: Seq[str]) -> list[ClusterOutput]:
        """Requests of `news` as they are now; they are news no more."""
        return [self._fresh.pop(name).output(self.tokenizer) for name in names]

    def watch(self) -> deque[ClusterOutput]:
        """Where requests that settle from now on come, too, whoever reads the news."""
        ended: deque[ClusterOutput] = deque()
        self._watchers.append(ended)
        return ended

    def unwatch(self, ended: deque[ClusterOutput]) -> None:
        """No longer."""
        self._watchers = [each for each in self._watchers if each is not ended]
