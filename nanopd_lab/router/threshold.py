"""Prompts over a length go through two workers, shorter ones stay on one: conditional disaggregation.

As Dynamo's (`isl_bounding`): what counts is the part of the prompt that has to be computed, without what a prefix cache
holds. It looks at no queue but to choose the worker.
"""

from __future__ import annotations

from collections.abc import Sequence

from nanopd_lab.router.policy import Decision, JobView, Role, WorkerView
from nanopd_lab.router.static import Collocated, Disaggregated

DEFAULT_TOKENS = 1024


class Threshold:
    """See the module.

    Args:
        tokens: of a prompt, uncached; longer ones are disaggregated

    Raises:
        ValueError: a negative threshold.
    """

    name = "threshold"

    def __init__(self, tokens: int = DEFAULT_TOKENS) -> None:
        if tokens < 0:
            raise ValueError(f"threshold is {tokens} tokens; it must be 0 (all disaggregated) or more")
        self.tokens = tokens
        self._short, self._long = Collocated(), Disaggregated()

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        prompt = job.uncached_tokens
        if prompt <= self.tokens:
            decision = self._short.choose(job, workers, now) or self._long.choose(job, workers, now)
            why = f"{prompt} uncached tokens, {self.tokens} at most"
        else:
            decision = self._long.choose(job, workers, now) or self._short.choose(job, workers, now)
            why = f"{prompt} uncached tokens, over {self.tokens}"
        return decision and decision._replace(reason=f"{why}; {decision.reason}")

    @staticmethod
    def roles(num_workers: int) -> list[Role]:
        """A quarter of the workers for long prompts only, one at least; alone a worker does all."""
        prefills = max(1, num_workers // 4) if num_workers > 1 else 0
        return [Role.PREFILL] * prefills + [Role.MIXED] * (num_workers - prefills)
