"""The controller: admits requests, chooses routes, keeps track of every try, retries what fails. Sans-IO.

    submit ──► queued ──policy──► active: prefill ──first token──► transfer ──Received──► decode ──► finished
                  ▲                                    │
                  └──────────────retry────────────────┘   a worker died or gave up: another route goes on behind
                                                           the tokens that the caller has already

Events go in with the time; actions come out. It holds no clock, no thread and no torch, so that the launchers, the
tests and the simulator drive the same code. Every job ends: with its tokens, by the caller, or with an error that
says what happened, at the latest at its deadline.
"""

from __future__ import annotations

import heapq
import itertools
import math
import warnings
from collections import OrderedDict, deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from nanopd_lab.cluster.accounts import AttemptReport, PathReport
from nanopd_lab.cluster.actions import (
    Action,
    ClusterBusyError,
    ClusterDownError,
    Emit,
    Fence,
    Limits,
    Send,
    Settled,
    State,
)
from nanopd_lab.cluster.asking import PolicyError, ask, told
from nanopd_lab.cluster.looking import WorkerLook
from nanopd_lab.cluster.messages import (
    Beat,
    Begin,
    Cancel,
    Capacity,
    Ended,
    Expect,
    Extend,
    Failed,
    FromWorker,
    Hello,
    Published,
    Received,
    Release,
    Tokens,
    ToWorker,
    Work,
)
from nanopd_lab.core import FinishReason, Route, SampledToken, SamplingParams
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import (
    Collocated,
    Decision,
    Explanation,
    Fleet,
    JobView,
    Policy,
    Postponed,
    Role,
    WorkerView,
)

EXPLAINABLE = 1024  # decisions that can be asked about
SUSPECT = 0.75  # of `Limits.heartbeat_s`: a worker that is silent for so long is watched for the rest
_NOBODY: frozenset[str] = frozenset()


@dataclass(eq=False, slots=True)
class _Attempt:
    key: str
    report: AttemptReport
    open: set[str]  # workers that may still hold something of it
    prefills: bool = True  # until its first token is here
    arrives: bool = True  # until the target has its KV
    leaves: bool = False  # its first token is here, and the target hasn't got its KV


@dataclass(eq=False, slots=True)
class _Job:
    request_id: str
    index: int
    prompt: Seq[int]
    params: SamplingParams
    deadline: float
    path: PathReport
    outputs: list[int] = field(default_factory=list)
    attempt: _Attempt | None = None
    avoid: frozenset[str] = _NOBODY
    queued: bool = False
    done: bool = False
    unsettled: int = 0  # attempts of which a worker may hold something

    @property
    def name(self) -> tuple[str, int]:
        return self.request_id, self.index


@dataclass(eq=False)
class _Worker:
    name: str
    role: Role
    state: State = State.STARTING
    capacity: Capacity | None = None
    beat: Beat | None = None
    last_seen: float = 0.0
    suspected: float | None = None  # since then, for its silence
    attempts: dict[str, _Attempt] = field(default_factory=dict)  # by key, those it may hold something of

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


def _count(attempts: Seq[_Attempt]) -> tuple[int, int]:
    return len(attempts), sum(attempt.report.known_tokens for attempt in attempts)


class Controller:
    """See the module.

    Args:
        policy: chooses routes
        roles: of the workers, by name
        limits: see `Limits`
    """

    def __init__(self, policy: Policy, roles: dict[str, Role], limits: Limits | None = None) -> None:
        self.policy = policy
        self.limits = limits or Limits()
        self.actions: list[Action] = []
        self.now = 0.0
        self.decisions = self.role_changes = 0
        self._workers = {name: _Worker(name, role) for name, role in roles.items()}
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._queue: deque[_Job] = deque()
        self._postponed: deque[_Job] = deque()  # these let the queue pass
        self._attempts: dict[str, tuple[_Job, _Attempt]] = {}
        self._fleet = Fleet(roles)
        self._changed: set[_Worker] = set()  # since the fleet was told
        self._capacities: set[Capacity] = set()  # those that there are; workers are mostly alike
        self._every_takes = self._any_takes = math.inf  # tokens of a sequence, every worker and the largest
        self._explainable: OrderedDict[tuple[str, int], Decision] = OrderedDict()  # the newest decisions
        self._finished = getattr(policy, "finished", None)
        self.policy_error: Exception | None = None  # the first that the policy has made
        self._numbers = itertools.count()
        self._deadlines: list[
            tuple[float, int, _Job]
        ] = []  # a heap; jobs that are done are left in until they come up

    # ------------------------------------------------------------------ the caller's side

    @property
    def longest(self) -> int:
        """Tokens of a sequence that the largest worker takes.

        Raises:
            ClusterDownError: no worker is left.
        """
        self._check_alive()
        return int(self._any_takes)

    def validate(self, prompt: Seq[int], params: SamplingParams) -> None:
        """Refuse what no worker could ever hold.

        Raises:
            InvalidRequestError: empty, or too long for the model or for every worker's pool.
            ClusterDownError: no worker is left.
        """
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        self._check_alive()
        total = len(prompt) + params.max_tokens
        if total <= self._any_takes:
            return
        largest = max(self._capacities, key=lambda capacity: capacity.longest)
        way_out = "" if largest.longest == largest.max_model_len else " or raise kv_cache_memory_bytes"
        raise InvalidRequestError(
            f"prompt ({len(prompt)} tokens) + max_tokens ({params.max_tokens}) = {total} tokens; the largest worker "
            f"takes {largest.longest} (max_model_len {largest.max_model_len}, {largest.num_blocks} blocks of "
            f"{largest.block_size}); shorten the prompt or lower max_tokens{way_out}"
        )

    def submit(
        self,
        request_id: str,
        prompt: Seq[int],
        params: SamplingParams,
        now: float,
        deadline: float = float("inf"),
        index: int = 0,
    ) -> None:
        """Queue one sample of a request. `deadline` is when it ends with an error if it has not finished. The prompt is
        not copied: leave it as it is.

        Raises:
            InvalidRequestError: see `validate`; or the id is in use
            ClusterBusyError: the queue is full
            ClusterDownError: no worker is left
        """
        self.now = now
        self.validate(prompt, params)
        if (request_id, index) in self._jobs:
            raise InvalidRequestError(f"request id {request_id!r} is already in use")
        if self.queue_length >= self.limits.max_queue:
            raise ClusterBusyError(
                f"{self.queue_length} requests wait for a worker, the limit is max_queue = {self.limits.max_queue}; "
                "try again later, or add workers"
            )
        job = _Job(request_id, index, prompt, params, deadline, PathReport(len(prompt), now))
        self._jobs[job.name] = job
        if deadline != math.inf:
            heapq.heappush(self._deadlines, (deadline, next(self._numbers), job))
        self._queue.append(job)
        job.queued = True
        self._dispatch()

    def cancel(self, request_id: str, now: float) -> None:
        """End all samples of a request; what it has stays. Unknown ids are ignored."""
        for job in [job for job in self._jobs.values() if job.request_id == request_id and not job.done]:
            self.finish(request_id, job.index, FinishReason.ABORT, now)

    def finish(
        self,
        request_id: str,
        index: int,
        reason: FinishReason,
        now: float,
        stop_reason: int | str | None = None,
    ) -> None:
        """End one sample from outside, for example at a stop string, which only the caller's side can see."""
        self.now = now
        job = self._jobs.get((request_id, index))
        if job is not None and not job.done:
            self._withdraw(job, None)
            self._end(job, reason, stop_reason=stop_reason)
            self._dispatch()

    # ------------------------------------------------------------------ the workers' side

    def handle(self, worker: str, message: FromWorker, now: float) -> None:
        """Take in one message of a worker."""
        self.now = now
        sender = self._workers[worker]
        sender.last_seen, sender.suspected = now, None
        if isinstance(message, (Hello, Beat)):
            self._heard(sender, message)
            return
        if (found := self._attempts.get(message.key)) is None:
            return
        job, attempt = found
        if isinstance(message, Ended):
            self._ended(job, attempt, sender, message)
            if self._queue or self._postponed:
                self._dispatch()
        elif job.attempt is not attempt:
            return  # of an earlier try
        elif isinstance(message, Tokens):
            self._tokens(job, attempt, worker, message)
        elif isinstance(message, Published):
            self._send(attempt.report.route.decode, message)
        elif isinstance(message, Extend):
            self._send(attempt.report.route.prefill, message)
        elif isinstance(message, Received):
            attempt.report.received = now
            self._arrived(attempt)
            self._left(attempt)
            self._send(attempt.report.route.prefill, Release(attempt.key))
        else:
            self._failed(job, attempt, worker, message)

    def _heard(self, sender: _Worker, message: Hello | Beat) -> None:
        self._changed.add(sender)
        if isinstance(message, Beat):
            sender.beat = message
        else:
            before, sender.state, sender.capacity = sender.capacity, State.UP, message.capacity
            self._capacities.add(message.capacity)
            if before is not None and before != message.capacity:
                self._capacities = {each.capacity for each in self._workers.values() if each.capacity}
            self._every_takes = float(min(capacity.longest for capacity in self._capacities))
            self._any_takes = float(max(capacity.longest for capacity in self._capacities))
            self._dispatch()

    def worker_down(self, name: str, reason: str, now: float, restarting: bool = False) -> None:
        """A worker is dead and holds nothing any more; whatever ran there is tried again elsewhere."""
        self.now = now
        worker = self._workers[name]
        worker.state = State.STARTING if restarting else State.GONE
        worker.beat = None
        worker.last_seen, worker.suspected = now, None
        self._changed.add(worker)
        for attempt in list(worker.attempts.values()):
            job, _ = self._attempts[attempt.key]
            # Once the target has everything, the source is not needed any more.
            needed = attempt.report.received is None or attempt.report.route.decode == name
            if job.attempt is attempt and needed:
                self._retry(job, f"worker {name} {reason}", name)
            self._close(job, attempt, worker)
        left = [each for each in self._workers.values() if each.state is not State.GONE]
        if not (any(each.role.prefills for each in left) and any(each.role.decodes for each in left)):
            for each in left:  # serving goes on with whoever is left
                self._give_role(each, Role.MIXED)
        if len(left) == 1:
            self.policy = Collocated()
            self._give_role(left[0], Role.MIXED)
        if not left:
            for job in [*self._queue, *self._postponed]:
                self._end(job, FinishReason.ERROR, error=f"no worker is left; the last one, {name}, {reason}")
        self._dispatch()

    def set_role(self, name: str, role: Role, now: float) -> None:
        """Change what a worker is asked to do from now on; what it has goes on as it is."""
        self.now = now
        self._give_role(self._workers[name], role)
        self._dispatch()

    def use_policy(self, policy: Policy, roles: Mapping[str, Role], now: float) -> None:
        """Route by another policy from now on, with other roles; workers keep what they have loaded and cached.

        Raises:
            ValueError: jobs are under way, whose routes the old policy chose; or a worker is gone.
        """
        if self._jobs:
            raise ValueError(
                f"{len(self._jobs)} requests are under way; wait until they have settled, then change the policy"
            )
        if gone := [name for name, worker in self._workers.items() if worker.state is State.GONE]:
            raise ValueError(f"worker {gone[0]} is gone, and the policy is for all; make a new cluster")
        self.exchange(policy)
        self.policy_error = None
        for name, role in roles.items():
            self.set_role(name, role, now)

    def exchange(self, policy: Policy) -> None:
        """Ask this one from now on: one that is around the policy so far, or was in it. Jobs and roles stay."""
        self.policy = policy
        self._finished = getattr(policy, "finished", None)

    def explain(self, request_id: str, index: int = 0) -> Explanation:
        """Why a request is, or was, where it is: of its last route.

        Raises:
            ValueError: it has had no route, or it is too long ago; the newest `EXPLAINABLE` decisions are kept.
        """
        decision = self._explainable.get((request_id, index))
        if decision is None:
            raise ValueError(
                f"nothing is known of a route of request {request_id!r}, sample {index}: it has had none, or more than "
                f"{EXPLAINABLE} decisions ago; ask sooner"
            )
        return decision.explain()

    def tick(self, now: float) -> None:
        """Deadlines of jobs, silence of workers.

        Who has been away itself, stopped or paused with the whole machine, has heard nobody: a worker is given up only
        if it was silent for `Limits.heartbeat_s`, and for the last quarter of that since a tick that found it silent.
        (The idea is that of Lifeguard, Dadgar et al. 2018: doubt yourself before the others.)

        Jobs that wait are offered when something has changed, however often this is called; where nothing runs, now.
        """
        self.now = now
        changed = not self._attempts
        for worker in self._workers.values():
            if worker.state is State.UP and now >= self._silent_until(worker):
                if worker.suspected is None:
                    worker.suspected = now
                else:
                    worker.last_seen, worker.suspected = now, None
                    reason = f"was silent for {self.limits.heartbeat_s} s"
                    self.actions.append(Fence(worker.name, reason))
        while self._deadlines and (self._deadlines[0][2].done or now >= self._deadlines[0][0]):
            job = heapq.heappop(self._deadlines)[2]
            if not job.done:
                waited = f"after {now - job.path.arrival:.3f} s, {self._where(job)}"
                self._withdraw(job, f"deadline {waited}")
                self._end(job, FinishReason.ERROR, error=f"the request's deadline passed {waited}")
                changed = True
        if changed:
            self._dispatch()

    def next_wakeup(self) -> float | None:
        """When `tick` has something to do next, if nothing else happens."""
        while self._deadlines and self._deadlines[0][2].done:
            heapq.heappop(self._deadlines)
        times = [self._deadlines[0][0]] if self._deadlines else []
        times += [self._silent_until(w) for w in self._workers.values() if w.state is State.UP]
        return min((time for time in times if time != float("inf")), default=None)

    def _silent_until(self, worker: _Worker) -> float:
        """When a worker that says nothing is suspected or, if it is, given up."""
        heartbeat_s = self.limits.heartbeat_s
        if worker.suspected is None:
            return worker.last_seen + SUSPECT * heartbeat_s
        return max(worker.last_seen + heartbeat_s, worker.suspected + (1 - SUSPECT) * heartbeat_s)

    # ------------------------------------------------------------------ routes

    def _dispatch(self) -> None:
        """Give queued jobs to workers, first come first served, while the policy finds a route; then those put off."""
        while self._queue:
            job = self._queue[0]
            try:
                answer = self._ask(job, False)
            except PolicyError as error:
                self._fail_by_policy(job, error)
                continue
            if answer is None:
                return
            self._queue.popleft()
            if isinstance(answer, Postponed):
                self._postponed.append(job)
            else:
                self._take(job, answer)
        while self._postponed:
            job = self._postponed[0]
            try:
                answer = self._ask(job, True)
            except PolicyError as error:
                self._fail_by_policy(job, error)
                continue
            if not isinstance(answer, Decision):
                return
            self._postponed.popleft()
            self._take(job, answer)

    def _fail_by_policy(self, job: _Job, error: PolicyError) -> None:
        """Only this job ends; others are asked for as before."""
        cause = error.__cause__
        self.policy_error = self.policy_error or (cause if isinstance(cause, Exception) else error)
        self._end(job, FinishReason.ERROR, error=str(error))

    def _ask(self, job: _Job, postponed: bool) -> Decision | Postponed | None:
        """What the policy says of a job; a route is legal. Raises PolicyError."""
        self._refresh()
        total = len(job.prompt) + job.params.max_tokens
        free = self._fleet_for(total)
        if not free.num_members:
            return None
        seen = JobView(
            len(job.prompt),
            len(job.prompt) + len(job.outputs),
            job.params,
            job.path.arrival,
            job.avoid,
            postponed=postponed,
        )
        answer = ask(self.policy, seen, free, self.now)
        if isinstance(answer, Decision):
            for name, role in answer.roles:
                self._give_role(self._workers[name], role)
        return answer

    def _take(self, job: _Job, decision: Decision) -> None:
        """Send a job where it was decided."""
        self.decisions += 1
        self._explainable[job.name] = decision
        self._explainable.move_to_end(job.name)
        if len(self._explainable) > EXPLAINABLE:
            self._explainable.popitem(last=False)
        job.queued = False
        self._start(job, decision.route)

    def _refresh(self) -> None:
        """Have the fleet know what has changed."""
        for worker in self._changed:
            view = None
            if worker.state is State.UP and worker.capacity:
                view = worker.view()
                if view.jobs >= (self.limits.max_jobs or 2 * view.max_num_seqs):
                    view = None
            self._fleet.put(worker.name, view)
        self._changed.clear()

    def _fleet_for(self, total: int) -> Fleet:
        """Those that have room for a job and could hold so many tokens: mostly all of them."""
        if total <= self._every_takes:
            return self._fleet
        fitting = Fleet(self._workers)
        for view in self._fleet:
            capacity = self._workers[view.name].capacity
            if capacity and total <= capacity.longest:
                fitting.put(view.name, view)
        return fitting

    def _start(self, job: _Job, route: Route) -> None:
        key = f"{job.request_id}/{job.index}#{next(self._numbers)}"
        work = Work(job.prompt, job.params, job.index, tuple(job.outputs))
        known = work.num_known
        report = AttemptReport(route, self.now, known)
        job.attempt = attempt = _Attempt(key, report, set(route))
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
        if source is not target:
            self._changed.add(target)
            self._send(route.decode, Expect(key, work, route.prefill))
        self._send(route.prefill, Begin(key, work, source is not target))

    # ------------------------------------------------------------------ progress

    def _tokens(self, job: _Job, attempt: _Attempt, worker: str, message: Tokens) -> None:
        if message.position != job.path.output_tokens:
            self._retry(
                job,
                f"tokens from position {message.position} came after {job.path.output_tokens}",
                attempt.report.route.decode,
            )
            return
        report, count = attempt.report, len(message.tokens)
        if report.first_token is None:
            report.first_token = self.now
            self._prefilled(attempt)
            if report.route.collocated:
                self._arrived(attempt)
            if self._postponed:
                self._dispatch()  # the source has less to do
        report.new_tokens += count
        job.path.output_tokens += count
        if message.finish_reason is None:
            job.outputs += [token.token for token in message.tokens]  # for another try
            self.actions.append(Emit(job.request_id, job.index, message.tokens))
            return
        report.whole = message.finish_reason is not FinishReason.ERROR
        # A token that ends the sample is sampled by the source: the target is not needed. Who tells of it has ended it.
        self._withdraw(job, None, worker)
        self._end(job, message.finish_reason, message.tokens, message.stop_reason, message.error)

    def _failed(self, job: _Job, attempt: _Attempt, worker: str, message: Failed) -> None:
        if message.retry:
            self._retry(job, message.error, worker)
        else:
            self._withdraw(job, message.error)
            self._end(job, FinishReason.ERROR, error=message.error)
        self._dispatch()

    def _retry(self, job: _Job, error: str, worker: str) -> None:
        """Give the current try up and queue the job again, in front."""
        self._withdraw(job, error)
        if len(job.path.attempts) >= self.limits.max_attempts:
            tries = len(job.path.attempts)
            self._end(
                job, FinishReason.ERROR, error=f"given up after {tries} attempts; the last one: {error}"
            )
            return
        job.avoid |= {worker}
        self._queue.appendleft(job)
        job.queued = True

    def _withdraw(self, job: _Job, failure: str | None, ended: str | None = None) -> None:
        """Have the workers drop the current try, but for the one where it has `ended`."""
        attempt, job.attempt = job.attempt, None
        if attempt is None:
            return
        attempt.report.failure = failure
        attempt.report.ended = self.now
        if others := attempt.open - {ended}:
            for name in sorted(others):
                self._send(name, Cancel(attempt.key))

    def _end(
        self,
        job: _Job,
        reason: FinishReason,
        tokens: tuple[SampledToken, ...] = (),
        stop_reason: int | str | None = None,
        error: str | None = None,
    ) -> None:
        job.done = True
        if job.queued:
            (self._postponed if job in self._postponed else self._queue).remove(job)
            job.queued = False
        job.path.finished = self.now
        if self._finished is not None and reason is not FinishReason.ERROR:
            censored = reason in (FinishReason.LENGTH, FinishReason.ABORT)
            self._teach(len(job.prompt), job.path.output_tokens, censored)
        self.actions.append(Emit(job.request_id, job.index, tokens, reason, stop_reason, error))
        self._settle(job)

    def _teach(self, prompt_tokens: int, output_tokens: int, censored: bool) -> None:
        """Tell the policy of an end; one that cannot take it in is told no more."""
        assert self._finished is not None
        try:
            self._finished(prompt_tokens, output_tokens, censored, self.now)
        except Exception as error:
            self.policy_error = self.policy_error or error
            self._finished = None
            warnings.warn(
                f"policy {self.policy.name} failed to take in the end of a request, and is told of no more: "
                f"{told(error)}",
                stacklevel=2,
            )

    # ------------------------------------------------------------------ accounts

    def _ended(self, job: _Job, attempt: _Attempt, worker: _Worker, message: Ended) -> None:
        if worker.name == attempt.report.route.prefill:
            attempt.report.prefill = message.usage
        else:
            attempt.report.decode = message.usage
        self._close(job, attempt, worker)

    def _close(self, job: _Job, attempt: _Attempt, worker: _Worker) -> None:
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

    def _prefilled(self, attempt: _Attempt) -> None:
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

    def _left(self, attempt: _Attempt) -> None:
        """The source need not hold its KV any more."""
        if attempt.leaves:
            attempt.leaves = False
            source = self._workers[attempt.report.route.prefill]
            source.leaving -= 1
            source.leaving_tokens -= attempt.report.known_tokens
            self._changed.add(source)

    def _arrived(self, attempt: _Attempt) -> None:
        """Its KV is where it will decode."""
        if attempt.arrives:
            attempt.arrives = False
            target = self._workers[attempt.report.route.decode]
            target.arriving -= 1
            target.arriving_tokens -= attempt.report.known_tokens
            self._changed.add(target)

    def _settle(self, job: _Job) -> None:
        if job.done and not job.unsettled and self._jobs.get(job.name) is job:
            del self._jobs[job.name]
            job.path.complete = True
            self.actions.append(Settled(job.request_id, job.index, job.path))

    # ------------------------------------------------------------------ small questions

    def _give_role(self, worker: _Worker, role: Role) -> None:
        if worker.role is not role:
            worker.role = role
            self.role_changes += 1
            self._changed.add(worker)

    def _send(self, worker: str, message: ToWorker) -> None:
        if self._workers[worker].state is State.UP:
            self.actions.append(Send(worker, message))

    def _check_alive(self) -> None:
        for worker in self._workers.values():
            if worker.state is not State.GONE:
                return
        raise ClusterDownError("no worker is left to serve a request; start a new cluster")

    def _where(self, job: _Job) -> str:
        attempt = job.attempt
        if attempt is None:
            return "while it waited for a worker"
        if attempt.report.first_token is None:
            return f"while {attempt.report.route.prefill} computed its prompt"
        if attempt.report.received is None and not attempt.report.route.collocated:
            return f"while {attempt.report.route.decode} waited for its KV"
        return f"while {attempt.report.route.decode} decoded, {len(job.outputs)} tokens done"

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
