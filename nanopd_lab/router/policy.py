"""What a routing policy sees and decides. The same code runs in the engine's controller and in the simulator."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from nanopd_lab.core import Route, SamplingParams
from nanopd_lab.router.explanation import Explainer, Explanation


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
    cached_tokens: of the known ones, those whose KV a worker is known to hold; 0 where nobody knows
    postponed: the policy has been asked before, and has put it off
    """

    prompt_tokens: int
    known_tokens: int
    params: SamplingParams
    arrival: float
    avoid: frozenset[str] = frozenset()
    cached_tokens: int = 0
    postponed: bool = False

    @property
    def uncached_tokens(self) -> int:
        """What a prefill has to compute."""
        return self.known_tokens - self.cached_tokens


class WorkerView(NamedTuple):
    """A worker as the controller knows it. Counts are of jobs routed to it that have not ended there.

    What a job knows is its prompt, and what the caller had of its output when it was routed; tokens that came since are
    not counted, so that engine and simulator, of which one reports every token, see the same.

    prefilling, prefill_tokens: jobs whose prompt it computes, and the tokens that these know
    decoding: jobs whose output it computes or will compute
    decode_tokens: that `decoding` know
    arriving, arriving_tokens: those of `decoding` whose KV is not there yet, and what they know
    leaving, leaving_tokens: jobs whose prompt it has computed for another worker, which has not got all of it yet
    prefill_since: when the first of its prompts got its turn: as the one before ended, or as it came (s)
    num_blocks, block_size, max_num_batched_tokens: as of its engine; 0 if not known
    """

    name: str
    role: Role
    prefilling: int = 0
    prefill_tokens: int = 0
    decoding: int = 0
    blocks_free: int = 0
    max_num_seqs: int = 0
    decode_tokens: int = 0
    arriving: int = 0
    arriving_tokens: int = 0
    leaving: int = 0
    leaving_tokens: int = 0
    prefill_since: float = 0.0
    num_blocks: int = 0
    block_size: int = 0
    max_num_batched_tokens: int = 0

    @property
    def jobs(self) -> int:
        return self.prefilling + self.decoding


class Decision(NamedTuple):
    """A route and, for people, why.

    reason: may be left to `explain`
    roles: what workers are to be asked from now on, by name; they change before the route is taken
    explainer: makes `explain`'s answer, from what was known at the decision
    """

    route: Route
    reason: str = ""
    roles: tuple[tuple[str, Role], ...] = ()
    explainer: Explainer | None = None

    def explain(self) -> Explanation:
        """Estimates for each candidate, and the term that decided. Made when it is asked for."""
        return self.explainer() if self.explainer else Explanation(self.route, self.reason)


class Postponed(NamedTuple):
    """The job lets others pass; it is offered again whenever a worker has ended something and nobody else waits.

    A policy must not put a job off while all workers are idle, or for ever.
    """

    reason: str = ""


class Policy(Protocol):
    """Decides where a job runs.

    It may have a method `finished(prompt_tokens, output_tokens, censored, now)` as well: a sample has ended after so
    many tokens, `censored` if it would have gone on (cut by max_tokens, cancelled). The controller tells it of each
    that ends without an error.
    """

    name: str

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        """A route over `workers` (those that are alive and have room), or None to let the job wait, and all behind it.

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
