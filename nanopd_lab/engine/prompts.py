"""From what a caller writes to token ids: prompts and conversations, checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        check_text(prompt, "the prompt")
        # Not verbose: it warns of long prompts that are refused, with a reason, further on.
        return prompt, list(tokenizer(prompt, verbose=False)["input_ids"])
    given = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(given, Iterable) or isinstance(given, (bytes, bytearray)):
        raise InvalidRequestError(
            f"the prompt is {prompt!r}; give text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'"
        )
    ids = list(given)
    if not all(type(token) is int for token in ids) or (ids and not 0 <= min(ids) <= max(ids) < vocab_size):
        ids = [_checked(token, position, vocab_size) for position, token in enumerate(ids)]
    return text, ids


def check_text(text: str, what: str) -> None:
    """Raise InvalidRequestError if it holds half a character, which tokenizers cannot read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{what} has a lone surrogate, {text[error.start]!r}, at character {error.start}, which is no text; "
            "remove it"
        ) from None


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
        InvalidRequestError: no template, no messages, one without role or text, or the template refuses them.
    """
    from jinja2 import TemplateError

    if tokenizer is None or not (chat_template or tokenizer.chat_template):
        raise InvalidRequestError(f"{model} has no chat template; pass chat_template or use generate")
    if not messages:
        raise InvalidRequestError("the conversation is empty; give at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise InvalidRequestError(
                f"message {message!r} lacks 'role' or 'content'; a message is "
                '{"role": "user", "content": "…"}'
            )
        if not isinstance(message["content"], str):
            raise InvalidRequestError(f"the content of message {message!r} is no text; give a string")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
        )
    except TemplateError as error:
        raise InvalidRequestError(f"the chat template refuses the conversation: {error}") from error
    check_text(text, "the conversation")
    # The template writes the special tokens itself.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return {"prompt": text, "prompt_token_ids": ids}


def as_batch(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A list of prompts out of one prompt or many: a list of integers is one prompt."""
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        return [prompts]
    batch = list(prompts.tolist() if hasattr(prompts, "tolist") else prompts)
    if batch and all(hasattr(item, "__index__") for item in batch):
        return [batch]
    return batch


def as_conversations(messages: Messages | Seq[Messages]) -> list[Messages]:
    """A list of conversations out of one or many."""
    if isinstance(messages, Mapping) or not isinstance(messages, Iterable):
        raise InvalidRequestError(
            f"the conversation is {messages!r}; give a list of messages, or a list of such lists"
        )
    batch = list(messages)
    if not batch or isinstance(batch[0], Mapping):
        return [batch]  # type: ignore[list-item]
    return batch  # type: ignore[return-value]


def params_for(
    batch: Seq[Prompt], params: SamplingParams | Seq[SamplingParams] | None
) -> Seq[SamplingParams]:
    """One for each prompt of the batch, out of one for all, one for each, or the defaults.

    Raises:
        InvalidRequestError: as many as there are neither one nor prompts, or something else.
    """
    if isinstance(params, SamplingParams) or params is None:
        return [check_params(params)] * len(batch)
    if not isinstance(params, (list, tuple)):
        check_params(params)
    if len(params) != len(batch):
        raise InvalidRequestError(
            f"{len(batch)} prompts but {len(params)} sampling_params; give one, or one for each prompt"
        )
    return [check_params(each) for each in params]


def check_params(params: object) -> SamplingParams:
    """These, or the defaults. Raises InvalidRequestError for anything else."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(
            f"sampling_params is {params!r}; give SamplingParams, for example SamplingParams(max_tokens=64)"
        )
    return params
