"""Tokens to text as they come, and the search for stop strings."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

# Decoding starts this many prompt tokens early, because a token's text can depend on the one before it.
CONTEXT = 5
# So many tokens without text are looked at again and again; of more the special ones, which have none, are left out.
SILENT = 16


class Detokenizer:
    """Text of one growing sample.

    A token may hold part of a UTF-8 character, and its text may depend on its neighbours, so text is released
    only once decoding a short window ends in a whole character: the difference between decoding the window
    with and without the new tokens (the scheme of Hugging Face's text-generation-inference and of vLLM).

    While the sample runs, the last characters are held back as long as they could be the beginning of a stop
    string, so that what a stream has shown never has to be taken back. A stop string that is complete before
    the sample has `min_tokens` tokens is text like any other, as in vLLM.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_token_ids: Seq[int],
        stop: Seq[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_token_ids[-CONTEXT:])
        self._prefix = 0
        self._read = self._context = len(self._ids)
        self._left_out = 0
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._hold_back = 0 if include_stop else max((len(text) - 1 for text in self._stop), default=0)
        self._text = ""
        self._ended = False

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    @property
    def num_pushed(self) -> int:
        """Tokens of the sample so far."""
        return len(self._ids) - self._context + self._left_out

    def push(self, *tokens: int) -> str | None:
        """Add tokens; returns the stop string that they completed, or None."""
        self._ids.extend(tokens)
        if len(self._ids) - self._read > SILENT:
            self._leave_out_special()
        known = self._decode(self._prefix, self._read)
        now = self._decode(self._prefix)
        if len(now) <= len(known) or now.endswith("\ufffd"):
            return None
        fresh = now[len(known) :]
        self._prefix, self._read = self._read, len(self._ids)
        return self._extend(fresh)

    def _leave_out_special(self) -> None:
        special = set(getattr(self._tokenizer, "all_special_ids", ()))
        fresh = self._ids[self._read :]
        kept = [token for token in fresh if token not in special]
        self._left_out += len(fresh) - len(kept)
        self._ids[self._read :] = kept

    def end(self) -> str | None:
        """No more tokens: release an unfinished character and what was held back."""
        if self._ended:
            return None
        fresh = self._decode(self._prefix)[len(self._decode(self._prefix, self._read)) :]
        stopped = self._extend(fresh)
        self._ended = True
        return stopped

    def _extend(self, fresh: str) -> str | None:
        old = len(self._text)
        self._text += fresh
        if self.num_pushed < self._min_tokens:
            return None
        found = [
            (at, text)
            for text in self._stop
            if (at := self._text.find(text, max(0, old - len(text) + 1))) >= 0
        ]
        if not found:
            return None
        at, text = min(found)
        self._text = self._text[: at + len(text) if self._include_stop else at]
        self._ended = True
        return text

    @property
    def text(self) -> str:
        """What may be shown."""
        if self._ended or not self._hold_back:
            return self._text
        return self._text[: -self._hold_back]
