"""What somebody sees who watches a cluster while it serves, see `Cluster.watched`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.cluster.actions import State
from nanopd_lab.cluster.messages import Beat, Capacity
from nanopd_lab.router import Role

if TYPE_CHECKING:
    from nanopd_lab.cluster.outputs import ClusterOutput


class WorkerLook(NamedTuple):
    """A worker as the controller knows it; counts are of tries that it may hold something of, each in one.

    capacity, beat: what it has told of itself, None before; a beat of a process is up to half a second old
    prefilling: it computes their prompt, or will
    awaited: it is to decode them, and has not got their KV from another worker
    decoding: it computes their output
    leaving: it has computed their prompt, and keeps their KV until another has it
    """

    name: str
    role: Role
    state: State
    capacity: Capacity | None
    beat: Beat | None
    prefilling: int
    awaited: int
    decoding: int
    leaving: int


class Look(NamedTuple):
    """A cluster at `now`, on its clock.

    queued: samples of requests that wait for a route
    running: requests that have not settled
    ended: those that have since the look before
    """

    now: float
    queued: int
    running: int
    ended: list[ClusterOutput]
    workers: list[WorkerLook]
