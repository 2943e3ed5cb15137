"""What a controller lets through and has others do: its limits, and the actions that a launcher carries out."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from nanopd_lab.cluster.accounts import PathReport
from nanopd_lab.cluster.messages import ToWorker
from nanopd_lab.core import FinishReason, SampledToken


class ClusterBusyError(ValueError):
    """The queue is full; nothing was queued. Ask again later."""


class ClusterDownError(ValueError):
    """No worker is left that could serve a request."""


@dataclass(frozen=True)
class Limits:
    """What the controller lets through, and how long it waits.

    max_queue: jobs without a route; more are refused
    max_jobs: jobs a worker may have at once; the rest waits here, where it can still choose. None: twice as many as
        run at once there
    max_attempts: tries at one job
    heartbeat_s: how long a worker in a process of its own may be silent before it counts as gone

    Raises:
        ValueError: a number that is not positive.
    """

    max_queue: int = 100_000
    max_jobs: int | None = None
    max_attempts: int = 5
    heartbeat_s: float = 30.0

    def __post_init__(self) -> None:
        for name, count in (
            ("max_queue", self.max_queue),
            ("max_jobs", self.max_jobs),
            ("max_attempts", self.max_attempts),
        ):
            if count is None and name == "max_jobs":
                continue
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} is {count!r}; it must be an integer of at least 1")
        if not isinstance(self.heartbeat_s, (int, float)) or not self.heartbeat_s > 0:
            raise ValueError(f"heartbeat_s is {self.heartbeat_s!r}; it must be a positive number")


class State(str, enum.Enum):
    """Of a worker: not ready yet (or restarting), serving, or gone for good."""

    STARTING = "starting"
    UP = "up"
    GONE = "gone"


@dataclass(slots=True)
class Send:
    """Give this message to a worker."""

    worker: str
    message: ToWorker


@dataclass(slots=True)
class Emit:
    """New tokens of a sample for the caller; the last one carries the finish reason."""

    request_id: str
    index: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(slots=True)
class Settled:
    """Every worker has given back what it held of this sample: its accounts are complete."""

    request_id: str
    index: int
    path: PathReport


@dataclass(frozen=True)
class Fence:
    """This worker is silent: make sure that it is dead before anything is restarted."""

    worker: str
    reason: str


Action = Send | Emit | Settled | Fence
