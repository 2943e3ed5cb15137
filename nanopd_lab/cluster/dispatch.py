"""Has the policy choose a route for each job that waits, sends the job there, and tells the policy how it ended.

queue ──ask──► route: begin, expect        first come first served, while a route is found
      ──ask──► put off: behind the others  the queue passes it; it is asked for again after it
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence as Seq

from nanopd_lab.cluster.actions import Emit, Limits, Send, State
from nanopd_lab.cluster.asking import PolicyError, ask, told
from nanopd_lab.cluster.ledger import Ledger
from nanopd_lab.cluster.messages import Begin, Capacity, Expect, ToWorker, Work
from nanopd_lab.cluster.pairs import largest_pair
from nanopd_lab.cluster.records import Job
from nanopd_lab.core import FinishReason, Route, SampledToken, SamplingParams
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.router import Decision, Explanation, Fleet, JobView, Policy, Postponed, Role

EXPLAINABLE = 1024  # decisions that can be asked about


class Dispatcher(Ledger):
    """See the module.

    Args:
        policy: chooses routes
        roles: of the workers, by name
        limits: see `Limits`
    """

    def __init__(self, policy: Policy, roles: dict[str, Role], limits: Limits | None = None) -> None:
        super().__init__(roles)
        self.policy = policy
        self.limits = limits or Limits()
        self.decisions = 0
        self.policy_error: Exception | None = None  # the first that the policy has made
        self._explainable: OrderedDict[tuple[str, int], Decision] = OrderedDict()  # the newest decisions
        self._finished = getattr(policy, "finished", None)

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

    # ------------------------------------------------------------------ what can be held

    @property
    def longest(self) -> int:
        """Tokens of a sequence that the largest pair of workers takes which the policy may choose, of those that are
        not gone for good; mostly what every worker takes.

        Raises:
            ClusterDownError: no worker is left.
        """
        self._check_alive()
        return int(min(self._any_takes, self._pair_takes()))

    def validate(self, prompt: Seq[int], params: SamplingParams) -> None:
        """Refuse what no pair of workers could ever hold.

        Raises:
            InvalidRequestError: empty, or too long for the model or for the pools.
            ClusterDownError: no worker is left.
        """
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        self._check_alive()
        total = len(prompt) + params.max_tokens
        if total > self._every_takes and total > min(self._any_takes, self._pair_takes()):
            raise InvalidRequestError(self._too_long(prompt, params))

    def _pair_takes(self) -> float:
        """As `longest`; infinite while somebody who has not told yet may take more."""
        pair = largest_pair(self.policy, self._workers.values())
        return self._any_takes if pair is None else pair.takes

    def _too_long(self, prompt: Seq[int], params: SamplingParams) -> str:
        """Why nobody takes it, and what to do."""
        asked = (
            f"prompt ({len(prompt)} tokens) + max_tokens ({params.max_tokens}) = "
            f"{len(prompt) + params.max_tokens} tokens"
        )
        shorter = "shorten the prompt or lower max_tokens"
        pair = largest_pair(self.policy, self._workers.values())
        if pair is not None and pair.takes < self._any_takes and (limit := pair.smaller.capacity) is not None:
            source, target = pair
            way_out = (
                ""
                if limit.longest == limit.max_model_len
                else ", or set kv_cache_memory_bytes, for pools alike"
            )
            return (
                f"{asked}; both workers of a route must hold it, and the largest pair that policy {self.policy.name} "
                f"may choose, {source.name} for prefill and {target.name} for decode, takes {limit.longest}: "
                f"{pair.smaller.name} has {_sizes(limit)}; {shorter}{way_out}"
            )
        largest = max(self._capacities, key=lambda capacity: capacity.longest)
        way_out = "" if largest.longest == largest.max_model_len else " or raise kv_cache_memory_bytes"
        return f"{asked}; the largest worker takes {largest.longest} ({_sizes(largest)}); {shorter}{way_out}"

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
            except InvalidRequestError as error:
                self._end(job, FinishReason.ERROR, error=str(error))
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
            except InvalidRequestError as error:
                self._end(job, FinishReason.ERROR, error=str(error))
                continue
            if not isinstance(answer, Decision):
                return
            self._postponed.popleft()
            self._take(job, answer)

    def _fail_by_policy(self, job: Job, error: PolicyError) -> None:
        """Only this job ends; others are asked for as before."""
        cause = error.__cause__
        self.policy_error = self.policy_error or (cause if isinstance(cause, Exception) else error)
        self._end(job, FinishReason.ERROR, error=str(error))

    def _ask(self, job: Job, postponed: bool) -> Decision | Postponed | None:
        """What the policy says of a job; a route is legal.

        Raises:
            PolicyError: see `ask`
            InvalidRequestError: no pair takes it any more.
        """
        self._refresh()
        total = len(job.prompt) + job.params.max_tokens
        if total > self._every_takes and total > self._pair_takes():
            raise InvalidRequestError(self._too_long(job.prompt, job.params))
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

    def _take(self, job: Job, decision: Decision) -> None:
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

    def _start(self, job: Job, route: Route) -> None:
        work = Work(job.prompt, job.params, job.index, tuple(job.outputs))
        key = self._open(job, route).key
        hands_off = not route.collocated
        if hands_off:
            self._send(route.decode, Expect(key, work, route.prefill))
        self._send(route.prefill, Begin(key, work, hands_off))

    def _send(self, worker: str, message: ToWorker) -> None:
        if self._workers[worker].state is State.UP:
            self.actions.append(Send(worker, message))

    # ------------------------------------------------------------------ ends

    def _end(
        self,
        job: Job,
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


def _sizes(capacity: Capacity) -> str:
    return f"max_model_len {capacity.max_model_len}, {capacity.num_blocks} blocks of {capacity.block_size}"
