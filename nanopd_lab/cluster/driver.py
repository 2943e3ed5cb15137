"""A cluster below its text: the controller, its workers, and a thread that keeps both going; token ids in, outputs out.

    submit ──► Controller ──► launcher ──► workers
                   ▲              │
      lock, thread └── messages ──┴── events ──► RequestBook ──► poll

Callers may be in any thread: one lock is around the controller and the book. With `launcher="inline"` there is no other
thread, and workers compute in whoever polls.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.inline import InlineLauncher
from nanopd_lab.cluster.launch import launch_workers
from nanopd_lab.cluster.launcher import WorkerLauncher
from nanopd_lab.cluster.looking import Look
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.cluster.requests import RequestBook
from nanopd_lab.core import SamplingParams
from nanopd_lab.router import WorkerView

if TYPE_CHECKING:
    from nanopd_lab.transfer.registry import Choice


class ClusterDriver:
    """See the module.

    Args:
        config: see `ClusterConfig`
        clock: seconds on one clock for all workers

    Raises:
        ValueError: a setting is wrong, or a worker could not be started; nothing is left running.
    """

    def __init__(self, config: ClusterConfig, clock: Callable[[], float]) -> None:
        self.config = config
        self.clock = clock
        policy, roles = config.route_policy()
        limits = config.limits
        if config.launcher == "inline":  # workers are silent there for as long as nobody gives them a turn
            limits = replace(limits, heartbeat_s=math.inf)
        self.controller = Controller(policy, dict(zip(config.names, roles, strict=True)), limits)
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False
        self._crash: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._owner: threading.Thread | None = None  # of an inline cluster, see `alone`
        self.launcher, self.tokenizer, self.vocab_size, self._transport = launch_workers(
            config, self.controller, roles, clock
        )
        self._requests = RequestBook(self.tokenizer, self.controller.finish)
        if isinstance(self.launcher, WorkerLauncher):
            self._thread = threading.Thread(
                target=self._drive, args=(self.launcher,), name="nanopd-controller", daemon=True
            )
            self._thread.start()

    # ------------------------------------------------------------------ requests

    def _submit(
        self,
        name: str | None,
        prompt: str | None,
        ids: list[int],
        params: SamplingParams,
        timeout_s: float | None,
    ) -> str:
        """Queue all samples of a request or none; its name."""
        with self._lock:
            self._check_usable()
            name = name or f"cluster-{next(self._numbers)}"
            now = self.clock()
            self.controller.validate(ids, params)
            self._requests.open(name, prompt, ids, params, now)
            deadline = now + (self.config.request_timeout_s if timeout_s is None else timeout_s)
            submitted = 0
            try:
                for index in range(params.n):
                    self.controller.submit(name, tuple(ids), params, now, deadline, index)
                    submitted += 1
            except ValueError:
                self._requests.forget(name)
                if submitted:
                    self.controller.cancel(name, now)
                raise
            self._collect()
        self._wake()
        return name

    def cancel(self, request_id: str) -> None:
        """End a request; what it has stays. Unknown ids are ignored."""
        with self._lock:
            self.controller.cancel(request_id, self.clock())
            self._collect()
        self._wake()

    def poll(self, timeout: float = 0.0, wanted: Container[str] | None = None) -> list[ClusterOutput]:
        """Requests that have got tokens, have ended or have settled since the last call; waits up to `timeout`
        seconds for some.

        Args:
            wanted: only of these; what has become of others stays for whoever asks for them

        Raises:
            ValueError: the cluster is closed.
            RuntimeError: its controller has stopped.
        """
        self._check_usable()
        if isinstance(self.launcher, InlineLauncher):
            deadline = self.clock() + timeout
            while True:
                events = self.launcher.step()
                with self._lock:
                    self._requests.take(events, self.clock())
                if self._requests.news(wanted) or self.clock() >= deadline:
                    break
        with self._changed:
            if timeout > 0 and self._thread is not None and not self._requests.news(wanted):
                self._changed.wait(timeout)
            self._check_crash()
            return self._requests.read(self._requests.news(wanted))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Meanwhile only this thread may use an inline cluster, which computes in whoever's thread polls; others get a
        ValueError instead of a race. One over processes is for all, and stays so."""
        with self._lock:
            self._check_usable()
            self._owner = threading.current_thread() if self._thread is None else None
        try:
            yield
        finally:
            self._owner = None

    # ------------------------------------------------------------------ looking inside

    @property
    def transport(self) -> Choice:
        """How KV moves between the workers (`name`) and why that way (`reason`)."""
        return self._transport()

    def workers(self) -> list[WorkerView]:
        """The workers that are up, as the policy sees them."""
        with self._lock:
            return self.controller.views()

    @contextmanager
    def watched(self) -> Iterator[Callable[[], Look]]:
        """Meanwhile a function that tells what the workers have and which requests have settled, whoever polls.

        It may be called from any thread; a few times a second costs the cluster nothing that could be measured.
        """
        with self._lock:
            ended = self._requests.watch()

        def look() -> Look:
            with self._lock:
                self.check_open()
                taken = [ended.popleft() for _ in range(len(ended))]
                queued, running = self.controller.queue_length, len(self._requests)
                return Look(self.clock(), queued, running, taken, self.controller.look())

        try:
            yield look
        finally:
            with self._lock:
                self._requests.unwatch(ended)

    def steps(self) -> dict[str, list[StepRecord]]:
        """With `trace=True`: every worker's steps since the last call, for timelines."""
        with self._lock:
            found = self.launcher.steps()
            self._collect()
            return found

    @property
    def longest(self) -> int:
        """Most tokens of a prompt with its output that a pair of workers takes.

        Raises:
            ClusterDownError: no worker is left.
        """
        with self._lock:
            return self.controller.longest

    def check_open(self) -> None:
        """Raise ValueError if it is closed, RuntimeError if its controller has stopped."""
        if self._closed:
            raise ValueError("the cluster is closed; make a new one")
        self._check_crash()

    def check_integrity(self) -> None:
        """Raise AssertionError if a worker has lost a block, or holds one although nothing runs."""
        with self._lock:
            self._check_owner()
            self.controller.check_integrity()
            # Known before they are asked: what they give back meanwhile is no loss.
            idle = not self.controller.num_unsettled
            found = self.launcher.check().values()
            self._collect()
        wrong = [each.broken or (each.held if idle else "") for each in found]
        assert not any(wrong), "; ".join(filter(None, wrong))

    def _check_usable(self) -> None:
        self.check_open()
        self._check_owner()

    def _check_owner(self) -> None:
        owner = self._owner
        if owner is not None and owner is not threading.current_thread():
            raise ValueError(
                f"thread {owner.name} has this inline cluster to itself: a cockpit is running, say; stop it first"
            )

    def _check_crash(self) -> None:
        if self._crash is not None:
            raise RuntimeError(f"the controller stopped: {self._crash}") from self._crash

    # ------------------------------------------------------------------ keeping it going

    def _drive(self, launcher: WorkerLauncher) -> None:
        try:
            while True:
                with self._lock:
                    if self._closed:
                        return
                    launcher.pump(0.0)
                    self._collect()
                    timeout = launcher.until_due(1.0)
                launcher.wait(timeout)
        except BaseException as error:
            with self._changed:
                self._crash = error
                self._changed.notify_all()

    def _wake(self) -> None:
        if isinstance(self.launcher, WorkerLauncher):
            self.launcher.wake()

    def _collect(self) -> None:
        """Carry out what the controller has decided, and take in what it has for callers."""
        self.launcher.collect()
        events, self.launcher.events = self.launcher.events, []
        if self._requests.take(events, self.clock()):
            self._changed.notify_all()

    def close(self) -> None:
        """Stop all workers. Requests that have not finished are lost. Safe to call twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._thread is not None:
            self._wake()
            self._thread.join(timeout=30)
        self.launcher.close()
