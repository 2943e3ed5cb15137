"""What a client sends: OpenAI's fields and vLLM's beside them, and what they mean for sampling.

Fields that nobody knows are ignored, as newer clients send them; fields that are known and not served are refused,
unless they say what is done anyway.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from nanopd_lab.core import SamplingParams
from nanopd_lab.errors import InvalidRequestError

DEFAULT_MAX_TOKENS = 16  # of a completion, as OpenAI has it


class StreamOptions(BaseModel):
    """What comes with a stream: usage in a chunk of its own at the end, and so far in every chunk (vLLM's)."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(BaseModel):
    """The fields that completions and chats share."""

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    # vLLM's
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    # Known, and not served.
    frequency_penalty: float | None = Field(default=None)
    presence_penalty: float | None = Field(default=None)
    logit_bias: dict[str, float] | None = None

    def unserved(self) -> dict[str, Any]:
        """Fields that are known and not served, by name, with what a client may set them to."""
        return {"frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {})}

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        """OpenAI's clients may send null for whatever has a default."""
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None}

    @model_validator(mode="after")
    def _refuse(self) -> Sampled:
        for name, allowed in self.unserved().items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {value!r}, which is not served here; leave it out")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is given and stream is false; set stream, or leave it out")
        return self

    def params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """For the engine.

        Raises:
            InvalidRequestError: a field is out of range.
        """
        return SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            logprobs=logprobs,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def unserved(self) -> dict[str, Any]:
        return super().unserved() | {"echo": (False,), "suffix": (None, ""), "best_of": (None, self.n)}

    def prompts(self) -> list[str | list[int]]:
        """One or more, each text or token ids.

        Raises:
            InvalidRequestError: none.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidRequestError("the prompt is empty; give text or at least one token")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def sampling(self) -> SamplingParams:
        """For the engine; raises InvalidRequestError."""
        return self.params(DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens, self.logprobs)


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One turn."""

    role: str
    content: str | list[TextPart] | None = None

    def rendered(self) -> dict[str, str]:
        """As chat templates want it."""
        content = self.content or ""
        return {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None

    def unserved(self) -> dict[str, Any]:
        return super().unserved() | {
            "response_format": (None, {"type": "text"}),
            "tools": (None, []),
            "functions": (None, []),
        }

    def sampling(self, room: int) -> SamplingParams:
        """For the engine; `room`: tokens that the longest context leaves behind the prompt, the default.

        Raises:
            InvalidRequestError: a field is out of range.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                f"top_logprobs is {self.top_logprobs} and logprobs is false; set logprobs"
            )
        wanted = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.params(
            max(1, room) if wanted is None else wanted, (self.top_logprobs or 0) if self.logprobs else None
        )
