"""The controller's books: where each job is, who holds something of each try, and what each worker has to do.

open ──► prefilled ──► arrived, left ──► closed by source and target ──► settled
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence as Seq

from nanopd_lab.cluster.accounts import AttemptReport, PathReport
from nanopd_lab.cluster.actions import Action, ClusterDownError, Settled, State
from nanopd_lab.cluster.looking import WorkerLook
from nanopd_lab.cluster.messages import Capacity
from nanopd_lab.cluster.records import Attempt, Job, WorkerRecord
from nanopd_lab.core import Route
from nanopd_lab.router import Fleet, Role, WorkerView


class Ledger:
    """See the module.

    Args:
        roles: of the workers, by name
    """

    def __init__(self, roles: dict[str, Role]) -> None:
        self.actions: list[Action] = []
        self.now = 0.0
        self.role_changes = 0
        self._workers = {name: WorkerRecord(name, role) for name, role in roles.items()}
        self._jobs: dict[tuple[str, int], Job] = {}
        self._queue: deque[Job] = deque()
        self._postponed: deque[Job] = deque()  # these let the queue pass
        self._attempts: dict[str, tuple[Job, Attempt]] = {}
        self._fleet = Fleet(roles)
        self._changed: set[WorkerRecord] = set()  # since the fleet was told
        self._capacities: set[Capacity] = set()  # those that there are; workers are mostly alike
        self._every_takes = self._any_takes = math.inf  # tokens of a sequence, every worker and the largest
        self._numbers = itertools.count()

    # ------------------------------------------------------------------ tries

    def _open(self, job: Job, route: Route) -> Attempt:
        """A try at a job begins; it is counted where it is to be."""
        key = f"{job.request_id}/{job.index}#{next(self._numbers)}"
        known = len(job.prompt) + len(job.outputs)
        report = AttemptReport(route, self.now, known)
        job.attempt = attempt = Attempt(key, report, set(route))
        job.path.attempts.append(report)
        job.unsettled += 1
        self._attempts[key] = job, attempt
        source, target = self._workers[route.prefill], self._workers[route.decode]
        source.attempts[key] = target.attempts[key] = attempt
        if not source.prefilling:
            source.prefill_since = self.now
        source.prefilling += 1
        source.prefill_tokens += known
        target.decoding += 1
        target.decode_tokens += known
        target.arriving += 1
        target.arriving_tokens += known
        self._changed.add(source)
        self._changed.add(target)
        return attempt

    def _close(self, job: Job, attempt: Attempt, worker: WorkerRecord) -> None:
        """This worker holds nothing of the attempt any more."""
        name, report = worker.name, attempt.report
        attempt.open.discard(name)
        worker.attempts.pop(attempt.key, None)
        if name == report.route.prefill:
            self._prefilled(attempt)
            self._left(attempt)
        if name == report.route.decode:
            self._arrived(attempt)
            worker.decoding -= 1
            worker.decode_tokens -= report.known_tokens
            self._changed.add(worker)
        if not attempt.open and attempt.key in self._attempts:
            del self._attempts[attempt.key]
            job.unsettled -= 1
            self._settle(job)

    def _prefilled(self, attempt: Attempt) -> None:
        if attempt.prefills:
            attempt.prefills = False
            source = self._workers[attempt.report.route.prefill]
            source.prefilling -= 1
            source.prefill_tokens -= attempt.report.known_tokens
            source.prefill_since = self.now
            if not attempt.report.route.collocated:
                attempt.leaves = True
                source.leaving += 1
                source.leaving_tokens += attempt.report.known_tokens
            self._changed.add(source)

    def _left(self, attempt: Attempt) -> None:
        """The source need not hold its KV any more."""
        if attempt.leaves:
            attempt.leaves = False
            source = self._workers[attempt.report.route.prefill]
            source.leaving -= 1
            source.leaving_tokens -= attempt.report.known_tokens
            self._changed.add(source)

    def _arrived(self, attempt: Attempt) -> None:
        """Its KV is where it will decode."""
        if attempt.arrives:
            attempt.arrives = False
            target = self._workers[attempt.report.route.decode]
            target.arriving -= 1
            target.arriving_tokens -= attempt.report.known_tokens
            self._changed.add(target)

    def _settle(self, job: Job) -> None:
        if job.done and not job.unsettled and self._jobs.get(job.name) is job:
            del self._jobs[job.name]
            job.path.complete = True
            self.actions.append(Settled(job.request_id, job.index, job.path))

    # ------------------------------------------------------------------ workers

    def _give_role(self, worker: WorkerRecord, role: Role) -> None:
        if worker.role is not role:
            worker.role = role
            self.role_changes += 1
            self._changed.add(worker)

    def _fits(self, worker: WorkerRecord, capacity: Capacity) -> None:
        """A worker has told what it takes."""
        before, worker.capacity = worker.capacity, capacity
        self._capacities.add(capacity)
        if before is not None and before != capacity:
            self._capacities = self._left_capacities()
        self._know_extremes()

    def _gone(self, worker: WorkerRecord) -> None:
        """A worker will not come back, and takes nothing any more."""
        worker.state = State.GONE
        # Where nobody who is left has told what it takes, what is known so far stands for it.
        self._capacities = self._left_capacities() or self._capacities
        self._know_extremes()

    def _left_capacities(self) -> set[Capacity]:
        return {
            each.capacity
            for each in self._workers.values()
            if each.capacity is not None and each.state is not State.GONE
        }

    def _know_extremes(self) -> None:
        if self._capacities:
            self._every_takes = float(min(capacity.longest for capacity in self._capacities))
            self._any_takes = float(max(capacity.longest for capacity in self._capacities))

    def _check_alive(self) -> None:
        for worker in self._workers.values():
            if worker.state is not State.GONE:
                return
        raise ClusterDownError("no worker is left to serve a request; start a new cluster")

    # ------------------------------------------------------------------ looking inside

    @property
    def num_unsettled(self) -> int:
        """Jobs that are not finished, or of which a worker may still hold something."""
        return len(self._jobs)

    @property
    def queue_length(self) -> int:
        return len(self._queue) + len(self._postponed)

    def path_of(self, request_id: str, index: int = 0) -> PathReport | None:
        """The accounts so far of a sample that has not settled; None if there is none of that name."""
        job = self._jobs.get((request_id, index))
        return job.path if job else None

    def views(self) -> list[WorkerView]:
        """The workers that are up, as a policy would see them."""
        return [worker.view() for worker in self._workers.values() if worker.state is State.UP]

    def look(self) -> list[WorkerLook]:
        """All workers with what they have, for somebody who watches; takes as long as there are tries."""
        return [worker.look() for worker in self._workers.values()]

    def state(self, worker: str) -> State:
        return self._workers[worker].state

    def check_integrity(self) -> None:
        """Raise AssertionError if a job or an attempt is lost."""
        for job in self._jobs.values():
            queued = self._queue.count(job) + self._postponed.count(job)
            assert queued + (job.attempt is not None) == (0 if job.done else 1), (
                f"job {job.name} is lost or twice"
            )
        for key, (job, attempt) in self._attempts.items():
            assert attempt.open, f"attempt {key} is open nowhere"
            for name in attempt.open:
                assert key in self._workers[name].attempts, f"{name} doesn't know of attempt {key}"
            assert job.name in self._jobs, f"attempt {key} is of a job that is gone"
        for worker in self._workers.values():
            routes = list(worker.attempts.values())
            prefilling = [a for a in routes if a.prefills and a.report.route.prefill == worker.name]
            assert worker.prefilling == len(prefilling), f"{worker.name}: load is miscounted"
            assert worker.prefill_tokens == sum(a.report.known_tokens for a in prefilling)
            decoding = [a for a in routes if a.report.route.decode == worker.name]
            arriving = [a for a in decoding if a.arrives]
            leaving = [a for a in routes if a.leaves and a.report.route.prefill == worker.name]
            assert (worker.decoding, worker.decode_tokens) == _count(decoding)
            assert (worker.arriving, worker.arriving_tokens) == _count(arriving)
            assert (worker.leaving, worker.leaving_tokens) == _count(leaving)


def _count(attempts: Seq[Attempt]) -> tuple[int, int]:
    return len(attempts), sum(attempt.report.known_tokens for attempt in attempts)
