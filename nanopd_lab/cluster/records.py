"""What a controller knows of each job, each try at it, and each worker."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from nanopd_lab.cluster.accounts import AttemptReport, PathReport
from nanopd_lab.cluster.actions import State
from nanopd_lab.cluster.looking import WorkerLook
from nanopd_lab.cluster.messages import Beat, Capacity
from nanopd_lab.core import SamplingParams
from nanopd_lab.router import Role, WorkerView

NOBODY: frozenset[str] = frozenset()


@dataclass(eq=False, slots=True)
class Attempt:
    """One try at a job, on one route."""

    key: str
    report: AttemptReport
    open: set[str]  # workers that may still hold something of it
    prefills: bool = True  # until its first token is here
    arrives: bool = True  # until the target has its KV
    leaves: bool = False  # its first token is here, and the target hasn't got its KV


@dataclass(eq=False, slots=True)
class Job:
    """One sample of a request, until it has settled."""

    request_id: str
    index: int
    prompt: Seq[int]
    params: SamplingParams
    deadline: float
    path: PathReport
    outputs: list[int] = field(default_factory=list)
    attempt: Attempt | None = None
    avoid: frozenset[str] = NOBODY
    queued: bool = False
    done: bool = False
    unsettled: int = 0  # attempts of which a worker may hold something

    @property
    def name(self) -> tuple[str, int]:
        return self.request_id, self.index


@dataclass(eq=False)
class WorkerRecord:
    """A worker, and what it has to do, counted: sequences and their tokens.

    prefilling: it computes their prompt, or will; arriving: it is to decode them, and has not got their KV;
    decoding: those and the ones whose output it computes; leaving: it keeps their KV until another has it
    """

    name: str
    role: Role
    state: State = State.STARTING
    capacity: Capacity | None = None
    beat: Beat | None = None
    last_seen: float = 0.0
    suspected: float | None = None  # since then, for its silence
    attempts: dict[str, Attempt] = field(default_factory=dict)  # by key, those it may hold something of

    prefilling: int = 0
    prefill_tokens: int = 0
    decoding: int = 0
    decode_tokens: int = 0
    arriving: int = 0
    arriving_tokens: int = 0
    leaving: int = 0
    leaving_tokens: int = 0
    prefill_since: float = 0.0
    _view: WorkerView | None = None

    def view(self) -> WorkerView:
        """What policies see of it; the same object for as long as that doesn't change."""
        capacity = self.capacity
        # For every change of every worker: past the Python code in `WorkerView(...)`.
        view = tuple.__new__(
            WorkerView,
            (
                self.name,
                self.role,
                self.prefilling,
                self.prefill_tokens,
                self.decoding,
                self.beat.blocks_free if self.beat else 0,
                capacity.max_num_seqs if capacity else 0,
                self.decode_tokens,
                self.arriving,
                self.arriving_tokens,
                self.leaving,
                self.leaving_tokens,
                self.prefill_since,
                capacity.num_blocks if capacity else 0,
                capacity.block_size if capacity else 0,
                capacity.max_num_batched_tokens if capacity else 0,
            ),
        )
        if self._view is None or view != self._view:
            self._view = view
        return self._view

    def look(self) -> WorkerLook:
        """What somebody who watches sees of it."""
        prefilling = awaited = decoding = leaving = 0
        for attempt in tuple(self.attempts.values()):  # another thread may be at work
            source, target = attempt.report.route
            if source == self.name and attempt.prefills:
                prefilling += 1
            elif source == self.name and attempt.leaves:
                leaving += 1
            elif target == self.name and attempt.arrives:
                awaited += 1
            elif target == self.name:
                decoding += 1
        return WorkerLook(
            self.name, self.role, self.state, self.capacity, self.beat, prefilling, awaited, decoding, leaving
        )
