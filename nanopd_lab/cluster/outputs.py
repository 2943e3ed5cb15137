"""What a cluster gives back for a request: as one engine, and for each sample where its tokens came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanopd_lab.cluster.accounts import PathReport
from nanopd_lab.engine.outputs import RequestOutput


class RequestFailedError(ValueError):
    """A request ended with an error: its deadline, its attempts, or what the model returned."""


@dataclass
class ClusterOutput(RequestOutput):
    """As `RequestOutput`, and for each sample where its tokens came from."""

    paths: list[PathReport] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """True once the accounts are complete: every worker has given back what it held of the request."""
        return self.finished and bool(self.paths) and all(path.complete for path in self.paths)

    @property
    def num_cached_prompt_tokens(self) -> int:
        """Tokens of the prompt that nobody had to compute: found in the prefix cache where its prefill began.
        `num_cached_tokens` is of all samples and counts what the decode worker had as well. 0 until `settled`."""
        usages = (attempt.prefill for path in self.paths[:1] for attempt in path.attempts)
        return next((usage.first_cached for usage in usages if usage is not None), 0)
