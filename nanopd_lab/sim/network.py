"""Pulls of KV blocks over a hierarchy of links that they share: GPUs in nodes, nodes in racks, racks at a core.

    gpu ─NVLink─ gpu      within a node: the two GPUs' NVLink ports
    gpu ─ node ─NIC──┐
                     ├─ rack switch ── uplink ── core (never full)
    gpu ─ node ─NIC──┘   uplink = nodes · NIC / oversubscription

Every link is two, one for each direction. Bandwidth is divided max-min fairly among the pulls (Bertsekas and Gallager,
Data Networks, 1992, section 6.5.2): nobody can have more without taking it from one who has no more than he. What a
pull that is held up elsewhere leaves unused goes to others, other than in `Links`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.links import Flow, LinkModel, Links

Resource = tuple[str, int]
"""A link and direction, such as ("nic-out", 3): of node 3."""


@dataclass(frozen=True)
class Topology:
    """Bandwidths in bytes/s of each direction.

    nvlink_bytes_per_s: of a GPU within its node; 390 GB/s is what a large copy between two H100s was measured at
    nic_bytes_per_s: of a node's network card, which its GPUs share; 50 GB/s is 400 Gb/s
    oversubscription: how many times more the nodes of a rack could send than its uplink takes

    Raises:
        ValueError: a number that is not positive.
    """

    gpus_per_node: int = 8
    nodes_per_rack: int = 4
    nvlink_bytes_per_s: float = 390e9
    nic_bytes_per_s: float = 50e9
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "gpus_per_node",
            "nodes_per_rack",
            "nvlink_bytes_per_s",
            "nic_bytes_per_s",
            "oversubscription",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    def path(self, source: int, target: int) -> tuple[Resource, ...]:
        """What a pull from GPU `source` to GPU `target` goes through; they are counted through the fleet."""
        nodes = source // self.gpus_per_node, target // self.gpus_per_node
        if nodes[0] == nodes[1]:
            return ("gpu-out", source), ("gpu-in", target)
        racks = nodes[0] // self.nodes_per_rack, nodes[1] // self.nodes_per_rack
        cards: tuple[Resource, ...] = ("nic-out", nodes[0]), ("nic-in", nodes[1])
        if racks[0] == racks[1]:
            return cards
        return *cards, ("up", racks[0]), ("down", racks[1])

    def capacity(self, resource: Resource) -> float:
        """Bytes/s of a link."""
        kind = resource[0]
        if kind in ("gpu-out", "gpu-in"):
            return self.nvlink_bytes_per_s
        if kind in ("nic-out", "nic-in"):
            return self.nic_bytes_per_s
        return self.nodes_per_rack * self.nic_bytes_per_s / self.oversubscription


class _Capacity(Protocol):
    def __call__(self, resource: Any, /) -> float: ...


def max_min(paths: Mapping[Any, Sequence[Hashable]], capacity: _Capacity) -> dict[Any, float]:
    """The max-min fair rate of each flow, from the links that it goes through: the fullest link first, whose flows all
    get the same, then the fullest of what is left."""
    users: dict[Hashable, dict[Any, None]] = {}
    for flow, path in paths.items():
        for link in path:
            users.setdefault(link, {})[flow] = None
    left = {link: capacity(link) for link in users}
    rates: dict[Any, float] = {}
    while users:
        tightest = min(users, key=lambda link: left[link] / len(users[link]))
        share = left[tightest] / len(users[tightest])
        for flow in list(users[tightest]):
            rates[flow] = share
            for link in paths[flow]:
                left[link] = max(0.0, left[link] - share)
                del users[link][flow]
                if not users[link]:
                    del users[link]
    return rates


@dataclass
class Network:
    """All pulls of a fleet that are being sent. Shards use it through `Port`."""

    topology: Topology
    queue: EventQueue
    paths: dict[Flow, tuple[Resource, ...]] = field(default_factory=dict)
    users: dict[Resource, dict[Flow, None]] = field(default_factory=dict)
    ports: dict[Flow, Port] = field(default_factory=dict)
    sent_bytes: dict[str, float] = field(default_factory=dict)  # by kind of link

    def add(self, flow: Flow, path: tuple[Resource, ...], port: Port) -> None:
        """It begins to send; others may get less."""
        self.paths[flow], self.ports[flow] = path, port
        for link in path:
            self.users.setdefault(link, {})[flow] = None
            self.sent_bytes[link[0]] = self.sent_bytes.get(link[0], 0.0) + flow.left_bytes
        self._share(path)

    def remove(self, flow: Flow) -> None:
        """It has ended; others may get more."""
        path = self.paths.pop(flow)
        del self.ports[flow]
        for link in path:
            del self.users[link][flow]
            if not self.users[link]:
                del self.users[link]
        self._share(path)

    def _share(self, changed: Iterable[Resource]) -> None:
        """Divide what the flows use that these links bear on, directly or through others."""
        found: dict[Flow, None] = {}
        links = list(changed)
        known = set(links)
        while links:
            for flow in self.users.get(links.pop(), ()):
                if flow not in found:
                    found[flow] = None
                    new = [link for link in self.paths[flow] if link not in known]
                    known.update(new)
                    links += new
        rates = max_min({flow: self.paths[flow] for flow in found}, self.topology.capacity)
        for flow in found:
            self.ports[flow].go_on(flow, rates[flow])


class Port(Links):
    """The links of one shard, whose workers are GPUs of the network from `first` on.

    Args:
        model: what a pull takes before it sends, which nobody shares; its bandwidth is not used
        network: what it shares with other shards
    """

    def __init__(self, model: LinkModel, queue: EventQueue, ended: Any, network: Network, first: int) -> None:
        super().__init__(model, queue, ended)
        self.network, self.first = network, first

    def _send(self, flow: Flow) -> bool:
        if flow.sending or not flow.left_bytes > 0:
            return False
        flow.sending = True
        path = self.network.topology.path(self._place(flow.source), self._place(flow.target))
        self.network.add(flow, path, self)
        return True

    def _place(self, worker: str) -> int:
        return self.first + int(worker[1:])

    def end(self, flow: Flow) -> None:
        """See `Links`."""
        del self.flows[flow]
        flow.turn = 0
        if flow.sending:
            self.network.remove(flow)

    def go_on(self, flow: Flow, rate: float) -> None:
        """At another rate from now on, bytes/s."""
        if rate == flow.rate:
            return
        now = self.queue.now
        flow.left_bytes = max(0.0, flow.left_bytes - flow.rate * (now - flow.since))
        flow.rate, flow.since = rate, now
        flow.turn = self.queue.push(now + flow.left_bytes / rate, Kind.PULL, partial(self._due, flow))
