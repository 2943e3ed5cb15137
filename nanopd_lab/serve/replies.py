"""What a client gets: outputs of the cluster in OpenAI's shapes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.core import Logprob
from nanopd_lab.engine.outputs import CompletionOutput

Json = dict[str, Any]


def error_body(message: str, kind: str, code: int, param: str | None = None) -> Json:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Reply:
    """One answer: its name, and whether it is a chat.

    name:  "cmpl-…" or "chatcmpl-…"
    top:   log-probabilities of so many tokens in each place were asked for
    timed: say how long things took, see `timing`
    """

    name: str
    model: str
    chat: bool
    top: int = 0
    timed: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def kind(self) -> str:
        return "chat.completion" if self.chat else "text_completion"

    def whole(self, outputs: Sequence[ClusterOutput]) -> Json:
        """Of finished requests, one a prompt: choices are numbered through."""
        samples = [sample for output in outputs for sample in output.outputs]
        choices = [self.choice(number, sample) for number, sample in enumerate(samples)]
        return {**self._head(self.kind), "choices": choices, **self._accounts(outputs)}

    def choice(self, number: int, sample: CompletionOutput) -> Json:
        """A finished sample."""
        shown: Json = {
            "index": number,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self.chat:
            shown["message"] = {"role": "assistant", "content": sample.text}
        else:
            shown["text"] = sample.text
        shown["logprobs"] = self.logprobs(sample, 0)
        return shown

    def first(self, number: int) -> Json:
        """Of a streamed chat: who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": number, "delta": delta, "logprobs": None, "finish_reason": None})

    def more(
        self,
        number: int,
        sample: CompletionOutput,
        text: str,
        first_token: int,
        so_far: Iterable[ClusterOutput] | None = None,
    ) -> Json:
        """What has come of a sample since the last chunk: `text`, and the tokens from `first_token`; with the usage
        of all outputs `so_far`, if given."""
        shown: Json = {"index": number}
        if self.chat:
            shown["delta"] = {"content": text}
        else:
            shown["text"] = text
        shown["logprobs"] = self.logprobs(sample, first_token)
        shown["finish_reason"] = sample.finish_reason
        if sample.finish_reason:
            shown["stop_reason"] = sample.stop_reason
        return self._chunk(shown) if so_far is None else self._chunk(shown) | {"usage": usage(so_far)}

    def totals(self, outputs: Sequence[ClusterOutput]) -> Json:
        """The chunk behind the last: usage, and no choice."""
        return {**self._head(self._chunk_kind), "choices": [], **self._accounts(outputs)}

    def logprobs(self, sample: CompletionOutput, first_token: int) -> Json | None:
        """Of the tokens from `first_token`, if they were asked for."""
        if sample.logprobs is None:
            return None
        tokens, tops = sample.token_ids[first_token:], sample.logprobs[first_token:]
        return (chat_logprobs if self.chat else completion_logprobs)(tokens, tops, self.top)

    def _accounts(self, outputs: Sequence[ClusterOutput]) -> Json:
        accounts: Json = {"usage": usage(outputs)}
        if self.timed:
            accounts["metrics"] = timing(outputs)
        return accounts

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> Json:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Json) -> Json:
        return {**self._head(self._chunk_kind), "choices": [choice]}


def usage(outputs: Iterable[ClusterOutput]) -> Json:
    """Tokens in and out. A prompt with n samples counts once."""
    prompts = completions = cached = 0
    for output in outputs:
        prompts += len(output.prompt_token_ids)
        completions += sum(len(sample.token_ids) for sample in output.outputs)
        cached += output.num_cached_prompt_tokens
    return {
        "prompt_tokens": prompts,
        "completion_tokens": completions,
        "total_tokens": prompts + completions,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timing(outputs: Sequence[ClusterOutput]) -> Json | None:
    """A request's own times, by vLLM's names and definitions (its documentation, "Per-Request Metrics").

    queue_time_ms: from submission until its first chunk is planned; time_to_first_token_ms: from there; their sum is
    what `nanopd_time_to_first_token_seconds` counts. tokens_per_second is over the time since the first plan. None
    for several samples or prompts; a field is None if a worker has died with what it knew.
    """
    if len(outputs) != 1 or len(outputs[0].outputs) != 1:
        return None
    metrics, (sample,) = outputs[0].metrics, outputs[0].outputs
    planned, times = metrics.first_scheduled_time, sample.token_times
    decoding = times[-1] - times[0] if times else None
    return {
        "time_to_first_token_ms": _ms(times[0] - planned) if times and planned is not None else None,
        "generation_time_ms": _ms(decoding),
        "queue_time_ms": _ms(planned - metrics.arrival_time) if planned is not None else None,
        "mean_itl_ms": _ms(decoding / (len(times) - 1)) if decoding is not None and len(times) > 1 else None,
        "tokens_per_second": (
            len(times) / (times[-1] - planned)
            if times and planned is not None and times[-1] > planned
            else None
        ),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def chat_logprobs(tokens: Sequence[int], tops: Sequence[Mapping[int, Logprob]], count: int) -> Json:
    """Chat's shape: an entry a token, with the `count` likeliest ones."""
    content = [
        {**_entry(top[token]), "top_logprobs": [_entry(entry) for entry in _likeliest(top, count)]}
        for token, top in zip(tokens, tops, strict=False)
    ]
    return {"content": content}


def completion_logprobs(tokens: Sequence[int], tops: Sequence[Mapping[int, Logprob]], count: int) -> Json:
    """The older shape: lists side by side."""
    shown = [top[token] for token, top in zip(tokens, tops, strict=False)]
    texts = [entry.decoded_token or "" for entry in shown]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [entry.logprob for entry in shown],
        "top_logprobs": [
            {entry.decoded_token or "": entry.logprob for entry in _likeliest(top, count)}
            for top in tops[: len(shown)]
        ],
        "text_offset": offsets,
    }


def _likeliest(top: Mapping[int, Logprob], count: int) -> list[Logprob]:
    # The drawn token is among them even if it is less likely.
    return sorted((entry for entry in top.values() if entry.rank <= count), key=lambda entry: entry.rank)


def _entry(entry: Logprob) -> Json:
    text = entry.decoded_token or ""
    return {"token": text, "logprob": entry.logprob, "bytes": list(text.encode())}
