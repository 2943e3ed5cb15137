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
import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq

from nanopd_lab.cluster.accounts import PathReport
from nanopd_lab.cluster.actions import ClusterBusyError, Emit, Fence, Limits, State
from nanopd_lab.cluster.dispatch import Dispatcher
from nanopd_lab.cluster.messages import (
    Beat,
    Cancel,
    Ended,
    Extend,
    Failed,
    FromWorker,
    Hello,
    Published,
    Received,
    Release,
    Tokens,
)
from nanopd_lab.cluster.records import Attempt, Job, WorkerRecord
from nanopd_lab.core import FinishReason, SamplingParams
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import Collocated, Policy, Role

SUSPECT = 0.75  # of `Limits.heartbeat_s`: a worker that is silent for so long is watched for the rest


class Controller(Dispatcher):
    """See the module.

    Args:
        policy: chooses routes
        roles: of the workers, by name
        limits: see `Limits`
    """

    def __init__(self, policy: Policy, roles: dict[str, Role], limits: Limits | None = None) -> None:
        super().__init__(policy, roles, limits)
        # A heap; jobs that are done are left in until they come up.
        self._deadlines: list[tuple[float, int, Job]] = []

    # ------------------------------------------------------------------ the caller's side

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
        job = Job(request_id, index, prompt, params, deadline, PathReport(len(prompt), now))
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

    def _heard(self, sender: WorkerRecord, message: Hello | Beat) -> None:
        self._changed.add(sender)
        if isinstance(message, Beat):
            sender.beat = message
        else:
            sender.state = State.UP
            self._fits(sender, message.capacity)
            self._end_oversized()
            self._dispatch()

    def _end_oversized(self) -> None:
        """End jobs that were let in and that no pair is left for: they would wait for ever, and all behind them."""
        if not self._queue and not self._postponed:
            return
        longest = self._pair_takes()
        for job in [*self._queue, *self._postponed]:
            if len(job.prompt) + job.params.max_tokens > longest:
                self._end(job, FinishReason.ERROR, error=self._too_long(job.prompt, job.params))

    def worker_down(self, name: str, reason: str, now: float, restarting: bool = False) -> None:
        """A worker is dead and holds nothing any more; whatever ran there is tried again elsewhere."""
        self.now = now
        worker = self._workers[name]
        if restarting:
            worker.state = State.STARTING
        else:
            self._gone(worker)
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
        elif not restarting:
            self._end_oversized()
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

    # ------------------------------------------------------------------ time

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

    def _silent_until(self, worker: WorkerRecord) -> float:
        """When a worker that says nothing is suspected or, if it is, given up."""
        heartbeat_s = self.limits.heartbeat_s
        if worker.suspected is None:
            return worker.last_seen + SUSPECT * heartbeat_s
        return max(worker.last_seen + heartbeat_s, worker.suspected + (1 - SUSPECT) * heartbeat_s)

    # ------------------------------------------------------------------ progress

    def _tokens(self, job: Job, attempt: Attempt, worker: str, message: Tokens) -> None:
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

    def _failed(self, job: Job, attempt: Attempt, worker: str, message: Failed) -> None:
        if message.retry:
            self._retry(job, message.error, worker)
        else:
            self._withdraw(job, message.error)
            self._end(job, FinishReason.ERROR, error=message.error)
        self._dispatch()

    def _retry(self, job: Job, error: str, worker: str) -> None:
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

    def _withdraw(self, job: Job, failure: str | None, ended: str | None = None) -> None:
        """Have the workers drop the current try, but for the one where it has `ended`."""
        attempt, job.attempt = job.attempt, None
        if attempt is None:
            return
        attempt.report.failure = failure
        attempt.report.ended = self.now
        if others := attempt.open - {ended}:
            for name in sorted(others):
                self._send(name, Cancel(attempt.key))

    def _ended(self, job: Job, attempt: Attempt, worker: WorkerRecord, message: Ended) -> None:
        if worker.name == attempt.report.route.prefill:
            attempt.report.prefill = message.usage
        else:
            attempt.report.decode = message.usage
        self._close(job, attempt, worker)

    def _where(self, job: Job) -> str:
        attempt = job.attempt
        if attempt is None:
            return "while it waited for a worker"
        if attempt.report.first_token is None:
            return f"while {attempt.report.route.prefill} computed its prompt"
        if attempt.report.received is None and not attempt.report.route.collocated:
            return f"while {attempt.report.route.decode} waited for its KV"
        return f"while {attempt.report.route.decode} decoded, {len(job.outputs)} tokens done"
