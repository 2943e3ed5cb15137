"""A worker in a process of this machine, with a pipe for its control messages."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess, SpawnProcess
from typing import TYPE_CHECKING

from nanopd_lab.cluster.worker_loop import WorkerSpec, run_worker
from nanopd_lab.starting import process_context, take_environment, uninterrupted

if TYPE_CHECKING:
    from nanopd_lab.transfer.registry import Choice

EXIT_S = 1.0  # a process's pipe ends a moment before it does


def worker_main(connection: Connection, spec: WorkerSpec, environment: Mapping[str, str]) -> None:
    """The body of the process."""
    take_environment(environment)
    run_worker(connection, spec)


class ProcessBody:
    """See `starter.Body`."""

    clock = None

    def __init__(self, process: SpawnProcess | ForkServerProcess, connection: Connection) -> None:
        self.connection: Connection | None = connection
        self.end: Connection | int = process.sentinel
        self._process = process

    @property
    def pid(self) -> int | None:
        """See `Body`."""
        return self._process.pid

    def reason(self) -> str:
        """See `Body`."""
        self._process.join(EXIT_S)
        code = self._process.exitcode
        return "closed its pipe" if code is None else f"died with exit code {code}"

    def join(self, timeout: float) -> bool:
        """See `Body`."""
        self._process.join(timeout)
        return not self._process.is_alive()

    def kill(self) -> None:
        """See `Body`."""
        self._process.kill()
        self._process.join()


class ProcessStarter:
    """See `starter.Starter`.

    Args:
        devices: of the workers
        transport: that they are told to use
    """

    def __init__(self, devices: Sequence[str], transport: str) -> None:
        self._context = process_context(devices)
        self._devices = devices
        self._transport = transport

    def transport(self) -> Choice:
        """See `Starter`: each worker has come to the same."""
        from nanopd_lab.transfer.registry import resolve_transport

        return resolve_transport(self._transport, self._devices)

    def start(self, spec: WorkerSpec, wake: Callable[[], None]) -> ProcessBody:
        """See `Starter`."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=worker_main,
            args=(theirs, spec, dict(os.environ)),
            name=f"nanopd-{spec.name}",
            daemon=True,
        )
        with uninterrupted():
            process.start()
        theirs.close()
        return ProcessBody(process, ours)

    def close(self) -> None:
        """See `Starter`: each process has gone with its body."""
