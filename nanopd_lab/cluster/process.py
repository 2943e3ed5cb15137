"""One process a worker. Control messages go through pipes, KV never does.

A worker ends when its pipe does, so none outlives the process that started it. What is sent to a worker waits in a
thread of its own: one that is stopped or busy cannot hold the controller up.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import Any

from nanopd_lab.cluster.actions import Action, Fence, Send, State
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.host import Connect, Disconnect, StepRecord
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.cluster.messages import Hello
from nanopd_lab.cluster.starting import process_context, take_environment
from nanopd_lab.engine.config import EngineConfig
from nanopd_lab.transfer import PoolAddress

BEAT_S = 0.5
STOP_S = 10.0  # for an orderly end


class WorkerStartError(ValueError):
    """A worker could not be started; the message holds its reason."""


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker's process needs to know."""

    name: str
    config: EngineConfig
    transport: str
    devices: tuple[str, ...]  # of all workers
    terms: LeaseTerms
    threads: int | None
    trace: bool
    life: int = 0


@dataclass(frozen=True)
class Stop:
    """End in order."""


@dataclass(frozen=True)
class Ask:
    """Answer with `Answer`: "check" (integrity, what is held) or "steps" (the record since the last time)."""

    what: str


@dataclass(frozen=True)
class Answer:
    """`value` is an error text or "" for "check", a list of `StepRecord` for "steps"."""

    what: str
    value: Any


@dataclass(frozen=True)
class StartFailed:
    """Instead of `Hello`."""

    error: str


def worker_main(connection: Connection, spec: WorkerSpec, environment: Mapping[str, str]) -> None:
    """The body of a worker's process: build, say hello, then turn after turn until the pipe ends."""
    take_environment(environment)
    os.environ["TQDM_DISABLE"] = "1"  # the bars of several processes would write over each other
    try:
        import torch

        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        device = spec.config.resolve_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # no context on the first GPU for whoever forgets to name one
        from nanopd_lab.cluster.build import build_host
        from nanopd_lab.transfer.registry import create_transport

        transport = create_transport(spec.transport, devices=spec.devices)
        host, _ = build_host(spec.name, spec.config, transport, spec.terms, life=spec.life, trace=spec.trace)
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send([StartFailed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")])
        return
    try:
        connection.send([host.hello()])
        host.post = connection.send
        _serve(connection, host)
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the controller is gone
    finally:
        host.close()


def _serve(connection: Connection, host: Any) -> None:
    next_beat = 0.0
    while True:
        messages: list[Any] = []
        # Go on at once after a step; while pulls are under way look often; else until something is due.
        pause = 0.0 if host.progressed else 0.0005 if host.busy else BEAT_S
        while connection.poll(0.0 if messages else pause):
            messages.extend(connection.recv())
        if any(isinstance(message, Stop) for message in messages):
            return
        answers = [_answer(host, message.what) for message in messages if isinstance(message, Ask)]
        found: list[Any] = host.turn([message for message in messages if not isinstance(message, Ask)])
        now = time.monotonic()
        if now >= next_beat:
            next_beat = now + BEAT_S
            found.append(host.core.beat())
        if found or answers:
            connection.send([*found, *answers])


def _answer(host: Any, what: str) -> Answer:
    if what == "steps":
        steps, host.steps = host.steps or [], []
        return Answer(what, steps)
    try:
        host.core.check_integrity()
    except AssertionError as error:
        return Answer(what, f"{host.core.name}: {error}")
    used = host.core.scheduler.allocator.stats().used
    return Answer(what, "" if host.core.idle and not used else f"{host.core.name} holds {used} blocks")


@dataclass(eq=False)
class _Child:
    spec: WorkerSpec
    process: SpawnProcess | ForkServerProcess
    connection: Connection
    outgoing: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    address: PoolAddress | None = None
    ready: bool = False
    lag_s: float = 0.0  # tests make a link slow

    def send_all(self) -> None:
        """The body of its sender thread."""
        while (message := self.outgoing.get()) is not None:
            batch = [message]
            while not self.outgoing.empty():
                batch.append(self.outgoing.get())
            last = batch[-1] is None
            if self.lag_s:
                time.sleep(self.lag_s)
            with contextlib.suppress(OSError, ValueError):  # it has died; the sentinel says so
                self.connection.send([each for each in batch if each is not None])
            if last:
                return


class ProcessLauncher:
    """Starts the workers' processes and carries messages between them and the controller. Used from one thread.

    Args:
        controller: knows the same workers
        specs: one for each
        max_restarts: of each worker
        start_timeout_s: for the first `Hello` of all

    Raises:
        WorkerStartError: one failed to start; the others are stopped again.
    """

    def __init__(
        self,
        controller: Controller,
        specs: list[WorkerSpec],
        max_restarts: int = 3,
        start_timeout_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.controller = controller
        self.clock = clock
        self.events: list[Action] = []
        self.answers: dict[str, Answer] = {}
        self._context = process_context(device for spec in specs for device in spec.devices)
        self._children: dict[str, _Child] = {}
        self._restarts = {spec.name: max_restarts for spec in specs}
        self._awake, self._wake = self._context.Pipe(duplex=False)
        self._closed = False
        self._failure: str | None = None
        try:
            for spec in specs:
                self._start(spec)
            deadline = time.monotonic() + start_timeout_s
            while not all(child.ready for child in self._children.values()):
                self.pump(0.2)
                slow = [name for name, child in self._children.items() if not child.ready]
                if self._failure is not None:
                    raise WorkerStartError(self._failure)
                if slow and time.monotonic() > deadline:
                    raise WorkerStartError(
                        f"worker {slow[0]} was not ready within {start_timeout_s} s; raise start_timeout_s"
                    )
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ processes

    def _start(self, spec: WorkerSpec) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=worker_main,
            args=(theirs, spec, dict(os.environ)),
            name=f"nanopd-{spec.name}",
            daemon=True,
        )
        process.start()
        theirs.close()
        child = self._children[spec.name] = _Child(spec, process, ours)
        threading.Thread(target=child.send_all, name=f"nanopd-to-{spec.name}", daemon=True).start()

    def pid(self, name: str) -> int | None:
        """Process id of a worker."""
        return self._children[name].process.pid

    def _died(self, name: str, reason: str) -> None:
        child = self._children.pop(name)
        child.outgoing.put(None)
        child.process.kill()
        child.process.join()
        child.connection.close()
        if not child.ready and self._failure is None:
            self._failure = f"worker {name} {reason} before it was ready"
        restart = child.ready and not self._closed and self._restarts[name] > 0
        self.controller.worker_down(name, reason, self.clock(), restarting=restart)
        for other in self._children.values():
            other.outgoing.put(Disconnect(name))
        if restart:
            self._restarts[name] -= 1
            spec = child.spec
            self._start(WorkerSpec(**{**vars(spec), "life": spec.life + 1}))

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
        """What has something to say: pipes and sentinels. Changes nothing, so that no lock need be held meanwhile."""
        children = list(self._children.values())
        try:
            pipes = [child.connection for child in children]
            return wait([*pipes, *(child.process.sentinel for child in children), self._awake], timeout)
        except (OSError, ValueError):  # a worker was given up in the meantime
            return []

    def pump(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for something to happen, and pass on all that has.

        What there is for the caller collects in `events`.
        """
        ready = self.wait(self.until_due(timeout))
        children = {child.connection: name for name, child in self._children.items()}
        sentinels = {child.process.sentinel: name for name, child in self._children.items()}
        died: list[str] = []
        for each in ready:
            if each is self._awake:
                while self._awake.poll():
                    self._awake.recv()
            elif (
                isinstance(each, Connection) and each in children and not self._receive(children[each], each)
            ):
                died.append(children[each])
        # What a worker said before it died has been read by now: its pipe is ready whenever its sentinel is.
        died += [sentinels[each] for each in ready if isinstance(each, int)]
        for name in dict.fromkeys(died):
            if name in self._children:
                self._children[name].process.join(1.0)  # its pipe ends a moment before it does
                code = self._children[name].process.exitcode
                self._died(name, "closed its pipe" if code is None else f"died with exit code {code}")
        self.controller.tick(self.clock())
        self.collect()

    def _receive(self, name: str, connection: Connection) -> bool:
        """Take in what a worker has sent; False if its pipe has ended."""
        child = self._children[name]
        try:
            while connection.poll():
                for message in connection.recv():
                    if isinstance(message, StartFailed):
                        self._failure = f"worker {name} could not be started: {message.error}"
                    elif isinstance(message, Answer):
                        self.answers[name] = message
                    else:
                        if isinstance(message, Hello):
                            self._introduce(name, child, message)
                        self.controller.handle(name, message, self.clock())
                        self.collect()
        except (EOFError, OSError):
            return False
        return True

    def _introduce(self, name: str, child: _Child, hello: Hello) -> None:
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

    def ask(self, what: str, timeout: float = 30.0) -> dict[str, Any]:
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

    def steps(self) -> dict[str, list[StepRecord]]:
        """Every worker's steps since the last time; empty unless it traces."""
        return self.ask("steps")

    def close(self) -> None:
        """Stop all processes: politely, then not."""
        if self._closed:
            return
        self._closed = True
        for child in self._children.values():
            child.outgoing.put(Stop())
            child.outgoing.put(None)
        deadline = time.monotonic() + STOP_S
        for child in self._children.values():
            child.process.join(max(0.0, deadline - time.monotonic()) if child.ready else 0.0)
            if child.process.is_alive():
                child.process.kill()
                child.process.join()
            child.connection.close()
        self._children.clear()
        self._wake.close()
        self._awake.close()
