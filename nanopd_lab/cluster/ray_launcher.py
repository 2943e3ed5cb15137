"""Starts workers as actors of Ray, and waits for their calls.

    controller ──actor, reserved bundle──► Ray ──starts──► worker
        ▲                                                    │ calls back, proves the key, says where it is
        └───spec: device, transport, addresses───────────────┘ and from then on messages, as in `launcher`

Where the workers are decides how KV moves, so the first of all are told what to do once all are there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nanopd_lab import __version__
from nanopd_lab.cluster.clocks import ClockOffset, Ping, clock_identity
from nanopd_lab.cluster.launcher import WorkerStartError
from nanopd_lab.cluster.ray_actor import Call, Here, WorkerActor, machine_identity
from nanopd_lab.cluster.ray_options import LEAST_CPUS, RayOptions
from nanopd_lab.cluster.ray_placement import reserve, transport_of
from nanopd_lab.cluster.ray_session import RaySession
from nanopd_lab.cluster.ray_socket import settled, sever, welcome
from nanopd_lab.cluster.worker_loop import WorkerSpec
from nanopd_lab.router import Role

PINGS = 10  # before the first message; then one with every beat
REASON_S = 0.5
GONE_S = 5.0
# Ray keeps to itself what it sets; and it alone says which GPUs a worker sees.
_NOT_PASSED_ON = ("RAY_", "CUDA_VISIBLE_DEVICES")


class RayBody:
    """See `launcher.Body`."""

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

    def arrived(self, here: Here, connection: Connection) -> None:
        """It has called."""
        self.here, self._called = here, connection

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
        threading.Thread(target=self._kill, name=f"nanopd-kill-{self.spec.name}", daemon=True).start()

    def _kill(self) -> None:
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor, no_restart=True)


class RayStarter:
    """See `launcher.Starter` and the module.

    Args:
        options: see `RayOptions`
        names: of the workers
        roles: of the workers
        on_cpus: they use no GPU, whatever Ray has
        threads: of each worker

    Raises:
        ValueError: Ray is missing or not reached, has no room for the workers, or an option is wrong.
    """

    def __init__(
        self,
        options: RayOptions,
        names: Sequence[str],
        roles: Sequence[Role],
        on_cpus: bool = True,
        threads: int = 1,
    ) -> None:
        self._session = session = RaySession.acquire(options)
        self._lock = threading.Lock()
        self._bodies: list[RayBody] = []
        self._awaited = dict.fromkeys(names)  # first lives that have not called
        self._here: dict[str, Here] = {}
        self._key, self._serial = secrets.token_bytes(32), secrets.token_hex(3)
        self._group: Any = None
        self._listener: socket.socket | None = None
        self._closed = False
        try:
            has_gpus = session.ray.cluster_resources().get("GPU", 0) > 0
            gpus = 0.0 if on_cpus else float(has_gpus) if options.num_gpus is None else options.num_gpus
            cpus = options.num_cpus
            if cpus is None:
                cpus = 0.0 if session.local else float(threads)
            self._takes = {"CPU": max(cpus, LEAST_CPUS), **options.resources} | (
                {"GPU": gpus} if gpus else {}
            )
            self._group, self._bundles = reserve(session.ray, options, roles, self._takes)
            self._of_worker = dict(zip(names, self._bundles.of_worker, strict=True))
            host = options.host or session.own_address()
            try:
                self._listener = socket.create_server((host, options.port))
            except OSError as error:
                raise WorkerStartError(
                    f"cannot wait for workers at {host}, port {options.port}: {error.strerror}; set host to an address "
                    "of this machine that its workers reach, and port to one that is free"
                ) from error
            self.address: tuple[str, int] = self._listener.getsockname()[:2]
            threading.Thread(target=self._accept, name="nanopd-ray-accept", daemon=True).start()
        except BaseException:
            self.close()
            raise

    def start(self, spec: WorkerSpec, wake: Callable[[], None]) -> RayBody:
        """See `Starter`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray, takes = self._session.ray, dict(self._takes)
        body = RayBody(ray, secrets.token_hex(16), spec, wake)
        cpus, gpus = takes.pop("CPU"), takes.pop("GPU", 0)
        actor = (
            ray.remote(WorkerActor)
            .options(
                name=f"nanopd-{self._serial}-{spec.name}-{spec.life}",
                num_cpus=cpus,
                num_gpus=gpus,
                resources=takes,
                max_restarts=0,  # the controller has to know of every life
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, self._of_worker[spec.name], placement_group_capture_child_tasks=False
                ),
                # A worker has to see its neighbours' GPUs to read from them; it is told which is its own.
                runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}} if gpus else None,
            )
            .remote()
        )  # fmt: skip
        call = Call(*self.address, self._key, body.ticket, self._environment())
        with self._lock:
            self._bodies.append(body)
        body.watch(actor, actor.serve.remote(call))
        return body

    def _environment(self) -> Mapping[str, str]:
        """Of a worker on this machine that of now, as for a process; other machines have their own."""
        if not self._session.local:
            return {}
        return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}

    # ------------------------------------------------------------------ calls

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._answer, args=(channel,), name="nanopd-ray-answer", daemon=True
            ).start()

    def _answer(self, channel: socket.socket) -> None:
        """One call; what goes wrong ends it, and Ray tells that the actor has ended."""
        connection = None
        try:
            connection = welcome(channel, self._key)
            here: Here = connection.recv()
            with self._lock:
                body = next((each for each in self._bodies if each.ticket == here.ticket), None)
            if body is None or body.killed or self._closed:
                connection.close()
                return
            if here.clock != clock_identity() or not here.clock:
                body.clock = _measured(connection)
            settled(connection)
        except (OSError, EOFError):
            if connection is not None:
                connection.close()
            return
        self._arrived(body, here, connection)

    def _arrived(self, body: RayBody, here: Here, connection: Connection) -> None:
        with self._lock:
            body.arrived(here, connection)
            self._here[body.spec.name] = here
            self._awaited.pop(body.spec.name, None)
            if self._awaited:
                return
            waiting = [each for each in self._bodies if each.here is not None and each.connection is None]
            for each in waiting:
                self._send_off(each)
        for each in waiting:
            each.wake()

    def _send_off(self, body: RayBody) -> None:
        """Tell a worker what to do, now that it is known where all are."""
        assert body.here is not None
        if body.here.version != __version__:
            body.refuse(
                f"runs nanopd-lab {body.here.version} on node {body.here.address}, and this is {__version__}; install "
                "the same there"
            )
            return
        try:
            transport = transport_of(body.spec.transport, body.here, self._here.values())
        except ValueError as error:
            body.refuse(f"cannot exchange KV: {error}")
            return
        config = replace(body.spec.config, device=body.here.device)
        devices = tuple(each.device for each in self._here.values())
        body.begin(replace(body.spec, config=config, transport=transport, devices=devices))

    # ------------------------------------------------------------------ what is where, and the end

    def places(self) -> dict[str, Here]:
        """Where the workers are, or were last."""
        with self._lock:
            return dict(self._here)

    def close(self) -> None:
        """See `Starter`."""
        if self._closed:
            return
        self._closed = True
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # ends `accept`
            self._listener.close()
        deadline = time.monotonic() + GONE_S
        for body in self._bodies:
            body.kill()
        ours = machine_identity()
        for body in self._bodies:
            body.join(max(0.0, deadline - time.monotonic()))
            while (
                body.here
                and body.here.machine == ours
                and _lives(body.here.pid)
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
        if self._group is not None:
            with contextlib.suppress(Exception):
                self._session.ray.util.remove_placement_group(self._group)
        self._session.release()


def _lives(pid: int) -> bool:
    """True while this is still an actor's process, also if it has ended and its node has not taken notice."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return not command or command.startswith(b"ray::")
    return False


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


def _measured(connection: Connection) -> ClockOffset:
    """The offset of the clock at the other end, which answers at once."""
    clock = ClockOffset()
    for _ in range(PINGS):
        connection.send(Ping(time.monotonic()))
        clock.observe(connection.recv(), time.monotonic())
    return clock
