"""One life of a worker that is an actor of Ray, as its launcher sees it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from nanopd_lab.cluster.clocks import ClockOffset
from nanopd_lab.cluster.ray_actor import Here
from nanopd_lab.cluster.ray_socket import sever
from nanopd_lab.cluster.worker_loop import WorkerSpec

REASON_S = 0.5  # for Ray to tell why a worker has ended


class RayBody:
    """See `starter.Body`."""

    def __init__(self, ray: Any, ticket: str, spec: WorkerSpec, wake: Callable[[], None]) -> None:
        self.connection: Connection | None = None
        self.clock: ClockOffset | None = None
        self.end, self._end = Pipe(duplex=False)
        self.ticket, self.spec, self.wake = ticket, spec, wake
        self.here: Here | None = None
        self.killed = False
        self._ray = ray
        self._called: Connection | None = None  # until it is told what to do
        self._actor: Any = None
        self._killer: threading.Thread | None = None
        self._finished = threading.Event()
        self._why = ""

    def watch(self, actor: Any, serving: Any) -> None:
        """Know of its end from Ray, too: before it has called, nobody else tells."""
        self._actor = actor
        serving.future().add_done_callback(self._ended)

    def _ended(self, serving: Any) -> None:
        error = serving.exception()
        if error is not None and not self._why:
            self._why = _told(error)
        self._finished.set()
        with contextlib.suppress(OSError):
            self._end.close()

    def arrived(self, here: Here, clock: ClockOffset | None, connection: Connection) -> None:
        """It has called."""
        self.here, self.clock, self._called = here, clock, connection

    @property
    def waits(self) -> bool:
        """It has called, and has not been told what to do."""
        return self._called is not None and self.connection is None and not self.killed

    def begin(self, spec: WorkerSpec) -> None:
        """Let it serve."""
        assert self._called is not None
        with contextlib.suppress(OSError):  # its end says so
            self._called.send(spec)
        self.connection = self._called

    def refuse(self, why: str) -> None:
        """It cannot be used."""
        self._why = why
        self._finished.set()
        with contextlib.suppress(OSError):
            self._end.close()

    @property
    def pid(self) -> int | None:
        """See `Body`."""
        return self.here.pid if self.here else None

    def reason(self) -> str:
        """See `Body`."""
        self._finished.wait(REASON_S)
        return self._why or "closed its connection"

    def join(self, timeout: float) -> bool:
        """See `Body`."""
        return self._finished.wait(timeout)

    def kill(self) -> None:
        """See `Body`."""
        self.killed = True
        if (connection := self.connection or self._called) is not None:
            sever(connection)
        # Not waited for: a Ray whose head is gone would not answer.
        if self._killer is None:
            self._killer = threading.Thread(
                target=self._kill, name=f"nanopd-kill-{self.spec.name}", daemon=True
            )
            self._killer.start()

    def settle(self, timeout: float) -> None:
        """After `kill`: until Ray has been told, so that it can be left."""
        if self._killer is not None:
            self._killer.join(timeout)

    def _kill(self) -> None:
        # Ray would start itself anew for somebody who asks it for something after its end.
        with contextlib.suppress(Exception):
            if self._ray.is_initialized():
                self._ray.kill(self._actor, no_restart=True)


def _told(error: BaseException) -> str:
    """Of an exception from Ray, which tells long stories, what happened."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [
        line for line in lines if "exit" in line.lower() or "died" in line.lower() or "node" in line.lower()
    ]
    return (causes or lines or [type(error).__name__])[0][:200]
