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
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nanopd_lab import __version__
from nanopd_lab.cluster.clocks import ClockOffset
from nanopd_lab.cluster.ray_actor import Call, Here, WorkerActor
from nanopd_lab.cluster.ray_body import RayBody
from nanopd_lab.cluster.ray_calls import CallDesk
from nanopd_lab.cluster.ray_options import LEAST_CPUS, RayOptions
from nanopd_lab.cluster.ray_placement import can_move, reserve, transport_between
from nanopd_lab.cluster.ray_session import RaySession
from nanopd_lab.cluster.starter import WorkerStartError
from nanopd_lab.cluster.worker_loop import WorkerSpec
from nanopd_lab.router import Role
from nanopd_lab.transfer.offers import host_identity, listen_on
from nanopd_lab.transfer.registry import Choice

GONE_S = 5.0
# Ray keeps to itself what it sets; and it alone says which GPUs a worker sees.
_NOT_PASSED_ON = ("RAY_", "CUDA_VISIBLE_DEVICES")


class RayStarter:
    """See `starter.Starter` and the module.

    Args:
        options: see `RayOptions`
        names: of the workers
        roles: of the workers
        kinds: of devices that are asked for; none: a GPU each if Ray has any
        threads: of each worker

    Raises:
        ValueError: Ray is missing or not reached, has no room for the workers, or an option is wrong.
    """

    def __init__(
        self,
        options: RayOptions,
        names: Sequence[str],
        roles: Sequence[Role],
        kinds: Collection[str] = (),
        threads: int = 1,
    ) -> None:
        self._choice: Choice | None = None  # of the transport, once all are there
        self._session = session = RaySession.acquire(options)
        self._lock = threading.Lock()
        self._bodies: list[RayBody] = []
        self._awaited = dict.fromkeys(names)  # first lives that have not called
        self._here: dict[str, Here] = {}
        self._key = secrets.token_bytes(32)
        self._group: Any = None
        self._desk: CallDesk | None = None
        self._closed = False
        try:
            self._takes = _taken(session, options, kinds, threads)
            self._group, bundles = reserve(session.ray, options, roles, self._takes)
            self._bundle = dict(zip(names, bundles.of_worker, strict=True))
            self._movable = not session.local and can_move(session.ray, options)
            host = options.host or session.own_address()
            self._desk = CallDesk(host, options.port, self._key, self._arrived)
        except BaseException:
            self.close()
            raise

    def start(self, spec: WorkerSpec, wake: Callable[[], None]) -> RayBody:
        """See `Starter`."""
        assert self._desk is not None
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ray, takes = self._session.ray, dict(self._takes)
        if not ray.is_initialized():
            raise WorkerStartError("this process is not connected to Ray any more")
        body = RayBody(ray, secrets.token_hex(16), spec, wake)
        cpus, gpus = takes.pop("CPU"), takes.pop("GPU", 0)
        actor = (
            ray.remote(WorkerActor)
            .options(
                num_cpus=cpus,
                num_gpus=gpus,
                resources=takes,
                max_restarts=0,  # the controller has to know of every life
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, self._bundle[spec.name], placement_group_capture_child_tasks=False
                ),
                # A worker has to see its neighbours' GPUs to read from them; it is told which is its own.
                runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}} if gpus else None,
            )
            .remote()
        )  # fmt: skip
        call = Call(*self._desk.address, self._key, body.ticket, spec.name, self._environment())
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

    def _arrived(self, here: Here, clock: ClockOffset | None, connection: Connection) -> bool:
        with self._lock:
            body = next((each for each in self._bodies if each.ticket == here.ticket), None)
            if body is None or body.killed or self._closed:
                return False
            body.arrived(here, clock, connection)
            self._here[body.spec.name] = here
            self._awaited.pop(body.spec.name, None)
            if self._awaited:
                return True
            waiting = [each for each in self._bodies if each.waits]
            for each in waiting:
                self._send_off(each)
        for each in waiting:
            each.wake()
        return True

    def _send_off(self, body: RayBody) -> None:
        """Tell a worker what to do, now that it is known where all are."""
        here = body.here
        assert here is not None
        if here.version != __version__:
            body.refuse(
                f"runs nanopd-lab {here.version} on node {here.address}, and this is {__version__}; install the same"
            )
            return
        try:
            if self._choice is None:
                self._choice = transport_between(body.spec.transport, self._here.values(), self._movable)
        except ValueError as error:
            body.refuse(f"cannot exchange KV: {error}")
            return
        offers = [each.offer for each in self._here.values()]
        name = self._choice.name
        if ":" not in name and (self._movable or len({offer.host for offer in offers}) > 1):
            name = listen_on(name, here.address)
        neighbours = tuple(offer.device for offer in offers if offer.host == here.offer.host)
        config = replace(body.spec.config, device=here.offer.device)
        body.begin(replace(body.spec, config=config, transport=name, devices=neighbours))

    # ------------------------------------------------------------------ what is where, and the end

    def transport(self) -> Choice:
        """See `Starter`."""
        assert self._choice is not None, "asked before all workers were there"
        return self._choice

    def places(self) -> dict[str, Here]:
        """Where the workers are, or were last."""
        with self._lock:
            return dict(self._here)

    def close(self) -> None:
        """See `Starter`."""
        if self._closed:
            return
        self._closed = True
        if self._desk is not None:
            self._desk.close()
        deadline = time.monotonic() + GONE_S
        for body in self._bodies:
            body.kill()
        for body in self._bodies:
            body.join(max(0.0, deadline - time.monotonic()))
            body.settle(max(0.0, deadline - time.monotonic()))
            here = body.here
            while here and here.offer.host == host_identity() and _lives(here.pid):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        if self._group is not None and self._session.ray.is_initialized():
            with contextlib.suppress(Exception):
                self._session.ray.util.remove_placement_group(self._group)
        self._session.release()


def _taken(
    session: RaySession, options: RayOptions, kinds: Collection[str], threads: int
) -> dict[str, float]:
    """What each worker takes."""
    gpus = options.num_gpus
    if gpus is None:
        has_gpus = session.ray.cluster_resources().get("GPU", 0) > 0
        gpus = float("cuda" in kinds or (has_gpus and "cpu" not in kinds))
    cpus = options.num_cpus
    if cpus is None:
        cpus = 0.0 if session.local else float(threads)
    return {"CPU": max(cpus, LEAST_CPUS), **options.resources} | ({"GPU": gpus} if gpus else {})


def _lives(pid: int) -> bool:
    """True while this is still an actor's process, also if it has ended and its node has not taken notice."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return not command or command.startswith(b"ray::")
    return False
