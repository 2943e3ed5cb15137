"""What a routing policy sees and decides. The same code runs in the engine's controller and in the simulator."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from nanopd_lab.core import Route, SamplingParams


class Role(str, enum.Enum):
    """What a worker may be asked to do; an admission rule, which may change while it runs."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class JobView(NamedTuple):
    """A sample of a request that waits for a route.

    prompt_tokens, known_tokens: of the prompt; and with what the caller has of the output already
    avoid: workers that failed it before
    """

    prompt_tokens: int
    known_tokens: int
    params: SamplingParams
    arrival: float
    avoid: frozenset[str] = frozenset()


class WorkerView(NamedTuple):
    """A worker as the controller knows it. Counts are of jobs routed to it that have not ended there.

    prefilling, prefill_tokens: jobs whose prompt it computes, and the tokens of those prompts
    decoding: jobs whose output it computes or will compute
    """

    name: str
    role: Role
    prefilling: int = 0
    prefill_tokens: int = 0
    decoding: int = 0
    blocks_free: int = 0
    max_num_seqs: int = 0

    @property
    def jobs(self) -> int:
        return self.prefilling + self.decoding


class Decision(NamedTuple):
    """A route and, for people, why."""

    route: Route
    reason: str = ""


class Policy(Protocol):
    """Decides where a job runs."""

    name: str

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        """A route over `workers` (those that are alive and have room), or None to let the job wait.

        The prefill worker's role must allow prefill and the decode worker's decode; collocated needs both.
        """
        ...


def legal_routes(workers: Sequence[WorkerView]) -> list[Route]:
    """Every pair that the roles allow."""
    return [
        Route(source.name, target.name)
        for source in workers
        if source.role.prefills
        for target in workers
        if target.role.decodes
    ]
