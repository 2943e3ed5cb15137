"""What a client gets: outputs of the cluster in OpenAI's shapes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanopd_lab.core import Logprob
from nanopd_lab.engine.outputs import CompletionOutput, RequestOutput

Json = dict[str, Any]


def error_body(message: str, kind: str, code: int, param: str | None = None) -> Json:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Reply:
    """One answer: its name, and whether it is a chat.

    name: "cmpl-…" or "chatcmpl-…"
    top:  log-probabilities of so many tokens in each place were asked for
    """

    name: str
    model: str
    chat: bool
    top: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def kind(self) -> str:
        return "chat.completion" if self.chat else "text_completion"

    def whole(self, outputs: Sequence[RequestOutput]) -> Json:
        """Of finished requests, one a prompt: choices are numbered through."""
        samples = [sample for output in outputs for sample in output.outputs]
        choices = [self.choice(number, sample) for number, sample in enumerate(samples)]
        return {**self._head(self.kind), "choices": choices, "usage": usage(outputs)}

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

    def more(self, number: int, sample: CompletionOutput, text: str, first_token: int) -> Json:
        """What has come of a sample since the last chunk: `text`, and the tokens from `first_token`."""
        shown: Json = {"index": number}
        if self.chat:
            shown["delta"] = {"content": text}
        else:
            shown["text"] = text
        shown["logprobs"] = self.logprobs(sample, first_token)
        shown["finish_reason"] = sample.finish_reason
        if sample.finish_reason:
            shown["stop_reason"] = sample.stop_reason
        return self._chunk(shown)

    def totals(self, outputs: Sequence[RequestOutput]) -> Json:
        """The chunk behind the last: usage, and no choice."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage(outputs)}

    def logprobs(self, sample: CompletionOutput, first_token: int) -> Json | None:
        """Of the tokens from `first_token`, if they were asked for."""
        if sample.logprobs is None:
            return None
        tokens, tops = sample.token_ids[first_token:], sample.logprobs[first_token:]
        return (chat_logprobs if self.chat else completion_logprobs)(tokens, tops, self.top)

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> Json:
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Json) -> Json:
        return {**self._head(self._chunk_kind), "choices": [choice]}


def usage(outputs: Iterable[RequestOutput]) -> Json:
    """Tokens in and out. A prompt with n samples counts once."""
    prompts = completions = cached = 0
    for output in outputs:
        prompts += len(output.prompt_token_ids)
        completions += sum(len(sample.token_ids) for sample in output.outputs)
        cached += output.num_cached_tokens
    return {
        "prompt_tokens": prompts,
        "completion_tokens": completions,
        "total_tokens": prompts + completions,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


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
