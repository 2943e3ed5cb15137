"""Outputs that have begun and not ended, as far as a policy can know: how far they should be by now."""

from __future__ import annotations

import math
from collections import deque

LATELY = 128  # outputs that have ended


class UnderWay:
    """See the module. Who has ended is known by his prompt's length only."""

    def __init__(self) -> None:
        # When those under way should have got their first token (s), by the prompt's length.
        self._begun: dict[int, deque[float]] = {}
        self.pace_s = 0.0  # a token, of outputs that have ended of late; 0 if none has
        self._ended: deque[tuple[float, int]] = deque(maxlen=LATELY)  # first token (s), length (tokens)

    def begins(self, prompt_tokens: int, when: float) -> None:
        """An output gets its first token then."""
        if (came := self._begun.get(prompt_tokens)) is None:
            came = self._begun[prompt_tokens] = deque()
        came.append(when)

    def ended(self, prompt_tokens: int, output_tokens: int, now: float) -> None:
        """One has ended."""
        if came := self._begun.get(prompt_tokens):
            begun = came.popleft()  # perhaps another one's, of the same length: what is left is as many
            self._ended.append((begun, output_tokens))
            if not came:
                del self._begun[prompt_tokens]
            if output_tokens > 1 and now > begun:
                pace_s = (now - begun) / output_tokens
                self.pace_s += (pace_s - self.pace_s) / 20 if self.pace_s else pace_s

    @property
    def lengths(self) -> list[int]:
        """Of outputs that have ended of late."""
        return [tokens for _, tokens in self._ended]

    def begun_since(self, since: float, now: float) -> tuple[list[int], list[float]]:
        """(lengths of those that have ended, tokens so far of those that go on) of outputs with a first token since."""
        ended = [tokens for begun, tokens in self._ended if begun >= since]
        going = [begun for times in self._begun.values() for begun in times if since <= begun < now]
        return ended, [(now - begun) / self.pace_s for begun in going] if self.pace_s else []

    def ages(self, now: float, pace_s: float) -> dict[int, list[float]]:
        """Tokens that each should have produced, by the bits of its prompt's length.

        Args:
            pace_s: a token, as long as none has ended
        """
        pace_s = self.pace_s or pace_s
        found: dict[int, list[float]] = {}
        if pace_s:
            for prompt, times in self._begun.items():
                ages = [(now - begun) / pace_s for begun in times if begun < now]
                found.setdefault(prompt.bit_length(), []).extend(ages)
        return found


class PromptShares:
    """Of each worker's time what prompts have taken lately; half of it is forgotten after `memory_s`."""

    def __init__(self, memory_s: float) -> None:
        self.memory_s = memory_s
        self._most_s = memory_s / math.log(2)  # of a worker whose prompts have always taken all time
        self._busy: dict[str, tuple[float, float]] = {}  # seconds of prompts, decayed, and as of when
        self._begun = 0.0
        self._all = 0.0, -math.inf  # what there would be if prompts had taken all time, and as of when

    def charge(self, name: str, seconds: float, now: float) -> None:
        """A prompt that outputs of the same worker wait for."""
        if not self._busy:
            self._begun = now
        total, since = self._busy.get(name, (0.0, now))
        self._busy[name] = total * 0.5 ** ((now - since) / self.memory_s) + seconds, now

    def of(self, name: str, now: float) -> float:
        """0 to 0.9."""
        found = self._busy.get(name)
        if found is None:
            return 0.0
        total, since = found
        seen_s, asked = self._all
        if asked != now:
            seen_s = self._most_s * (1 - 0.5 ** ((now - self._begun) / self.memory_s))
            self._all = seen_s, now
        share = total * 0.5 ** ((now - since) / self.memory_s) / (total if total > seen_s else seen_s)
        return share if share < 0.9 else 0.9
