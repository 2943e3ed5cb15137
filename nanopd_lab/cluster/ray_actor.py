"""A worker as an actor of Ray: it calls the controller back, and serves over that connection until it ends.

Ray places it, reserves what it takes, and tells of its end. Messages take a socket of their own, as quick as those of a
process of this machine (a call to an actor takes longer than a decode step of a small model), and KV the transport's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nanopd_lab import __version__
from nanopd_lab.cluster.clocks import Ping, Pong, clock_identity
from nanopd_lab.cluster.ray_options import device_of
from nanopd_lab.cluster.ray_socket import connect
from nanopd_lab.cluster.worker_loop import WorkerSpec, run_worker
from nanopd_lab.transfer.offers import Offer, own_offer


@dataclass(frozen=True)
class Call:
    """Where the controller waits, and with what to prove that one may come: Ray has carried it.

    ticket: of this life of the worker
    environment: to be added to the worker's
    """

    host: str
    port: int
    key: bytes
    ticket: str
    worker: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Here:
    """A worker's first message: where Ray has put it.

    offer: its device there, and how KV can get to it and from it
    address: of its node
    clock: the same for workers whose `time.monotonic()` is the same
    """

    ticket: str
    pid: int
    address: str
    offer: Offer
    clock: str
    version: str = __version__


class WorkerActor:
    """See the module. One of Ray's workers is its process."""

    def serve(self, call: Call) -> None:
        """Until the controller says so; or is gone, and then this process ends too.

        Raises:
            OSError: the controller cannot be reached, or isn't the one that asked.
        """
        import ray

        os.environ.update(call.environment)
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        address = ray.util.get_node_ip_address()
        try:
            connection = connect(call.host, call.port, call.key)
        except OSError as error:
            raise OSError(
                f"node {address} does not reach the controller at {call.host}, port {call.port}: {error}; open that "
                "port to it (RayOptions.port fixes its number)"
            ) from error
        device = device_of(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        # A Ray at loopback is one machine's: nothing goes between machines, and trying takes time.
        offer = own_offer(call.worker, device, None if address.startswith("127.") else address)
        here = Here(call.ticket, os.getpid(), address, offer, clock_identity())
        connection.send(here)
        spec = _spec_after_pings(connection)
        stopped = spec is not None and run_worker(connection, spec)
        connection.close()
        if not stopped:
            ray.actor.exit_actor()


def _spec_after_pings(connection: Connection) -> WorkerSpec | None:
    """What to do, once all workers are there; None: the controller is gone, or does not want this one."""
    try:
        while True:
            message: Any = connection.recv()
            if isinstance(message, WorkerSpec):
                return message
            if isinstance(message, Ping):
                connection.send(Pong.to(message))
    except (EOFError, OSError):
        return None
