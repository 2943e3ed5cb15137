"""Carries messages between the controller and workers in processes of their own, and starts those again that died.

KV never comes this way.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

from nanopd_lab.cluster.actions import Action, Fence, Send, State
from nanopd_lab.cluster.child import Child
from nanopd_lab.cluster.clocks import SAME_CLOCK, Ping, Pong, Reading, on_our_clock
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.host import Connect, Disconnect, Findings, StepRecord
from nanopd_lab.cluster.messages import Beat, Hello
from nanopd_lab.cluster.starter import Starter, WorkerStartError
from nanopd_lab.cluster.worker_loop import Answer, Ask, StartFailed, Stop, WorkerSpec

logger = logging.getLogger(__name__)

STOP_S = 10.0  # for an orderly end


class WorkerLauncher:
    """See the module. Used from one thread.

    Args:
        controller: knows the same workers
        starter: starts them; closed with this
        specs: one for each worker
        max_restarts: of each worker
        start_timeout_s: for the `Hello` of a worker; one that is late when it is started again is given up
        clock: seconds, the controller's

    Raises:
        WorkerStartError: one failed to start; the others are stopped again.
    """

    def __init__(
        self,
        controller: Controller,
        starter: Starter,
        specs: list[WorkerSpec],
        max_restarts: int = 3,
        start_timeout_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.controller = controller
        self.clock = clock
        self.events: list[Action] = []
        self.answers: dict[str, Answer] = {}
        self.starter = starter
        self._start_timeout_s = start_timeout_s
        self._children: dict[str, Child] = {}
        self._restarts = {spec.name: max_restarts for spec in specs}
        self._awake, self._wake = Pipe(duplex=False)
        self._closed = False
        self._failure: str | None = None
        try:
            for spec in specs:
                self._start(spec)
            while not all(child.ready for child in self._children.values()):
                self.pump(0.2)
                if self._failure is not None:
                    raise WorkerStartError(self._failure)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ workers

    def _start(self, spec: WorkerSpec) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        child = Child(spec, self.starter.start(spec, self.wake), deadline)
        self._children[spec.name] = child
        child.begin_to_send()

    def pid(self, name: str) -> int | None:
        """Process id of a worker, on its machine; None if it is not known yet."""
        return self._children[name].body.pid

    def clock_of(self, name: str) -> Reading:
        """How far a worker's clock is from the controller's."""
        clock = self._children[name].body.clock
        return SAME_CLOCK if clock is None else clock.read(self.clock())

    def _died(self, name: str, reason: str) -> None:
        child = self._children.pop(name)
        child.give_up()
        if not child.ready and self._failure is None:
            self._failure = f"worker {name} {reason} before it was ready"
        started_before = child.ready or child.spec.life > 0
        restart = started_before and not self._closed and self._restarts[name] > 0
        if started_before:
            logger.warning("worker %s %s and is %s", name, reason, "started again" if restart else "given up")
        self.controller.worker_down(name, reason, self.clock(), restarting=restart)
        for other in self._children.values():
            other.outgoing.put(Disconnect(name))
        if restart:
            self._restarts[name] -= 1
            try:
                self._start(replace(child.spec, life=child.spec.life + 1))
            except Exception as error:  # where they are started may be gone, too
                self.controller.worker_down(name, f"could not be started again: {error}", self.clock())

    def _give_up_the_late(self) -> None:
        now = time.monotonic()
        for name in [n for n, child in self._children.items() if not child.ready and now > child.deadline]:
            if self._failure is None:
                self._failure = (
                    f"worker {name} was not ready within {self._start_timeout_s} s; raise start_timeout_s"
                )
            self._restarts[name] = 0
            self._died(name, f"was not ready within {self._start_timeout_s} s")

    # ------------------------------------------------------------------ messages

    def wake(self) -> None:
        """Have a `pump` that waits in another thread return soon."""
        with contextlib.suppress(OSError):
            self._wake.send(None)

    def until_due(self, longest: float) -> float:
        """Seconds until the controller has something to do if no message comes, `longest` at most."""
        due = self.controller.next_wakeup()
        return longest if due is None else min(longest, max(0.0, due - self.clock()))

    def wait(self, timeout: float) -> list[Any]:
        """What has something to say: connections and ends. Changes nothing, so that no lock need be held meanwhile."""
        bodies = [child.body for child in list(self._children.values())]
        try:
            connections = [body.connection for body in bodies if body.connection is not None]
            return wait([*connections, *(body.end for body in bodies), self._awake], timeout)
        except (OSError, ValueError):  # a worker was given up in the meantime
            return []

    def pump(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for something to happen, and pass on all that has.

        What there is for the caller collects in `events`.
        """
        ready = set(self.wait(self.until_due(timeout)))
        if self._awake in ready:
            while self._awake.poll():
                self._awake.recv()
        died: list[str] = []
        for name, child in list(self._children.items()):
            child.begin_to_send()
            body = child.body
            ended = body.end in ready
            # What a worker said before it died is read in any case.
            if (
                (ended or body.connection in ready)
                and name in self._children
                and not self._receive(name, child)
            ):
                ended = True
            if ended:
                died.append(name)
        for name in died:
            if name in self._children:
                self._died(name, self._children[name].body.reason())
        self._give_up_the_late()
        self.controller.tick(self.clock())
        self.collect()

    def _receive(self, name: str, child: Child) -> bool:
        """Take in what a worker has sent; False if its connection has ended."""
        connection = child.body.connection
        try:
            while connection is not None and connection.poll():
                for message in connection.recv():
                    self._take(name, child, message)
        except (EOFError, OSError):
            return False
        return True

    def _take(self, name: str, child: Child, message: Any) -> None:
        now, clock = self.clock(), child.body.clock
        if isinstance(message, StartFailed):
            self._failure = f"worker {name} could not be started: {message.error}"
        elif isinstance(message, Pong):
            if clock is not None:
                clock.observe(message, now)
        elif isinstance(message, Answer):
            self.answers[name] = message
        else:
            if isinstance(message, Hello):
                self._introduce(name, child, message)
            elif isinstance(message, Beat) and clock is not None:
                child.outgoing.put(Ping(now))
            if clock is not None:
                message = on_our_clock(message, clock.read(now).offset_s)
            self.controller.handle(name, message, now)
            self.collect()

    def _introduce(self, name: str, child: Child, hello: Hello) -> None:
        child.ready, child.address = True, hello.address
        for other_name, other in self._children.items():
            if other_name != name and other.address is not None and child.address is not None:
                other.outgoing.put(Connect(child.address))
                child.outgoing.put(Connect(other.address))

    def collect(self) -> None:
        """Carry out what the controller has decided."""
        actions, self.controller.actions = self.controller.actions, []
        for action in actions:
            if isinstance(action, Send):
                if action.worker in self._children:
                    self._children[action.worker].outgoing.put(action.message)
            elif isinstance(action, Fence):
                if action.worker in self._children:
                    self._died(action.worker, action.reason)
                    self.collect()
            else:
                self.events.append(action)

    def _ask(self, what: str, timeout: float = 30.0) -> dict[str, Any]:
        """Ask every worker that is up; their answers by name. Those that don't answer in time are left out."""
        self.answers.clear()
        asked = [name for name in self._children if self.controller.state(name) is State.UP]
        for name in asked:
            self._children[name].outgoing.put(Ask(what))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and any(
            n in self._children and n not in self.answers for n in asked
        ):
            self.pump(0.1)
        return {name: answer.value for name, answer in self.answers.items()}

    def check(self) -> dict[str, Findings]:
        """What is wrong with each worker."""
        return self._ask("check")

    def steps(self) -> dict[str, list[StepRecord]]:
        """Every worker's steps since the last time, on the controller's clock; empty unless it traces."""
        found: dict[str, list[StepRecord]] = self._ask("steps")
        for name, steps in found.items():
            if name in self._children and (offset_s := self.clock_of(name).offset_s):
                found[name] = [step.shifted(-offset_s) for step in steps]
        return found

    def close(self) -> None:
        """Stop all workers: politely, then not."""
        if self._closed:
            return
        self._closed = True
        try:
            for child in self._children.values():
                child.outgoing.put(Stop())
                child.outgoing.put(None)
            deadline = time.monotonic() + STOP_S
            for child in self._children.values():
                child.body.join(max(0.0, deadline - time.monotonic()) if child.ready else 0.0)
                child.give_up()
            self._children.clear()
        finally:
            self.starter.close()
            self._wake.close()
            self._awake.close()
