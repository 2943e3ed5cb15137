"""Who starts workers in processes of their own, and what they run in.

A child of this process (`process`) or an actor of Ray on some node (`ray_launcher`): the launcher sees no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Protocol

from nanopd_lab.cluster.clocks import ClockOffset
from nanopd_lab.cluster.worker_loop import WorkerSpec

if TYPE_CHECKING:
    from nanopd_lab.transfer.registry import Choice


class WorkerStartError(ValueError):
    """A worker could not be started; the message holds its reason."""


class Body(Protocol):
    """What a worker runs in."""

    @property
    def connection(self) -> Connection | None:
        """To its `run_worker`; None until it is there."""
        ...

    @property
    def end(self) -> Connection | int:
        """Can be waited for, and is ready once the worker has ended."""
        ...

    @property
    def clock(self) -> ClockOffset | None:
        """The offset of its clock; None if it shares the controller's."""
        ...

    @property
    def pid(self) -> int | None:
        """Process id, on its machine."""
        ...

    def reason(self) -> str:
        """How it ended, behind the worker's name. May take a moment to find out."""
        ...

    def join(self, timeout: float) -> bool:
        """Wait for its end; False if it goes on."""
        ...

    def kill(self) -> None:
        """End it, at once; nothing can be sent or received any more. What has ended already is left alone."""
        ...


class Starter(Protocol):
    """Starts workers."""

    def start(self, spec: WorkerSpec, wake: Callable[[], None]) -> Body:
        """Begin to; returns at once. `wake` is called when the connection has come later than that."""
        ...

    def transport(self) -> Choice:
        """How KV moves between the workers, once all are there, and why."""
        ...

    def close(self) -> None:
        """Release all, after the bodies have ended."""
        ...
