"""From what a caller writes to token ids: prompts and conversations, checked."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from nanopd_lab.core import SamplingParams
from nanopd_lab.errors import InvalidRequestError

Prompt = str | Seq[int] | Mapping[str, Any]
Messages = Seq[Mapping[str, Any]]


def tokenize(prompt: Prompt, tokenizer: Any, vocab_size: int, model: str) -> tuple[str | None, list[int]]:
    """(text if there was one, token ids) of a prompt: text, token ids, or vLLM's dict with either.

    Raises:
        InvalidRequestError: neither text nor token ids, ids out of range, or text without a tokenizer.
    """
    text = None
    if isinstance(prompt, Mapping):
        text = prompt.get("prompt")
        prompt = prompt.get("prompt_token_ids") or text or ""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequestError(f"{model} has no tokenizer; give the prompt as token ids")
        # Not verbose: it warns of long prompts that are refused, with a reason, further on.
        return prompt, list(tokenizer(prompt, verbose=False)["input_ids"])
    ids = list(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
    if not all(type(token) is int for token in ids) or (ids and not 0 <= min(ids) <= max(ids) < vocab_size):
        ids = [_checked(token, position, vocab_size) for position, token in enumerate(ids)]
    return text, ids


def _checked(token: Any, position: int, vocab: int) -> int:
    if not hasattr(token, "__index__") or isinstance(token, bool) or not 0 <= token.__index__() < vocab:
        raise InvalidRequestError(
            f"prompt token {position} is {token!r}; token ids are integers from 0 to {vocab - 1}"
        )
    return int(token.__index__())


def render_chat(
    messages: Messages,
    tokenizer: Any,
    model: str,
    add_generation_prompt: bool = True,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """The prompt that the model's chat template makes of a conversation: its text and token ids.

    Raises:
        InvalidRequestError: no template, no messages, or one without role or content.
    """
    if tokenizer is None or not (chat_template or tokenizer.chat_template):
        raise InvalidRequestError(f"{model} has no chat template; pass chat_template or use generate")
    if not messages:
        raise InvalidRequestError("the conversation is empty; give at least one message")
    for message in messages:
        if not {"role", "content"} <= set(message):
            raise InvalidRequestError(f"message {dict(message)!r} lacks 'role' or 'content'")
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=chat_template,
    )
    # The template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return {"prompt": text, "prompt_token_ids": ids}


def as_batch(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A list of prompts out of one prompt or many: a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    batch = list(prompts)
    if batch and all(hasattr(item, "__index__") for item in batch):
        return [batch]  # type: ignore[list-item]
    return batch  # type: ignore[return-value]


def as_conversations(messages: Messages | Seq[Messages]) -> list[Messages]:
    """A list of conversations out of one or many."""
    if messages and isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]


def params_for(
    batch: Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None
) -> Seq[SamplingParams]:
    """One for each prompt of the batch, out of one for all, one for each, or the defaults.

    Raises:
        InvalidRequestError: as many as there are neither one nor prompts.
    """
    if isinstance(params, SamplingParams) or params is None:
        return [params or SamplingParams()] * len(batch)
    if len(params) != len(batch):
        raise InvalidRequestError(
            f"{len(batch)} prompts but {len(params)} sampling_params; give one, or one for each prompt"
        )
    return params
