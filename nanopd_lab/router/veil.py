"""Keeps output lengths from policies in simulations and benchmarks.

There a request ends at its `max_tokens`, so that a policy that saw it would know the output's length, which no server
does. Policies are shown one `max_tokens` for all instead, and learn lengths as they do when serving: from outputs that
have ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanopd_lab.core import SamplingParams
from nanopd_lab.router.policy import Decision, JobView, Policy, Postponed, WorkerView

MAX_TOKENS = 2048


class Veiled:
    """A policy that is shown `max_tokens`, whatever the request has; all else goes through.

    Args:
        max_tokens: an output that is as long or longer counts as cut off

    Raises:
        ValueError: it is not positive.
    """

    def __init__(self, policy: Policy, max_tokens: int = MAX_TOKENS) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        self.policy, self.max_tokens, self.name = policy, max_tokens, policy.name
        self._params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        if (learn := getattr(policy, "finished", None)) is not None:

            def finished(prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
                # The output ends of itself where its max_tokens says; what is longer than all may be counts as cut.
                learn(prompt_tokens, min(output_tokens, max_tokens), output_tokens >= max_tokens, now)

            self.finished = finished

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        shown = tuple.__new__(JobView, (*job[:2], self._params, *job[3:]))  # quicker than `_replace`
        return self.policy.choose(shown, workers, now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)
