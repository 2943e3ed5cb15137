"""A fleet in virtual time: a front door, shards with a controller each, one network, failures.

    requests ──► FrontDoor ──► Shard 0: Controller ──► workers ─┐
                     │   └───► Shard 1: Controller ──► workers ─┴─ Network, or links of each shard
                     └───────► …

Shards, policies and workers are those of `Simulator`; one shard whose controller takes no time is a `Simulator` to the
bit. A fleet under full load makes millions of tokens a second, so that a run may end before all is served: when none
of those that are open could be in time any more (`slo`). They are recorded as open, and the share in time is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.config import SimConfig
from nanopd_lab.sim.failures import ControllerKill
from nanopd_lab.sim.front_door import DoorRule, FrontDoor
from nanopd_lab.sim.network import Network, Port, Topology
from nanopd_lab.sim.results import RequestRecord, SimResult
from nanopd_lab.sim.shard import ControllerTime, MakePolicy, Shard
from nanopd_lab.sim.simulator import uncollected
from nanopd_lab.sim.timing import StepTime
from nanopd_lab.sim.workload import Kill, SimRequest, in_order

LOOKS_S = 0.1  # virtual seconds between two looks whether the run may end


@dataclass(frozen=True)
class FleetConfig:
    """How a fleet is divided.

    busy: how long a controller takes, from the number of its workers
    topology: the network; None: every worker has a card of its own (`SimConfig.link`), which is shared by its pulls
    failover_s: after which the front door gives up a controller that does not answer, and asks others
    slo: the simulation ends when nobody who is open can be served like this any more; None: when all are served

    Raises:
        ValueError: no worker, no shard, a shard without workers, or a time below 0.
    """

    workers: int
    shards: int = 1
    door: DoorRule = field(default_factory=DoorRule)
    busy: Callable[[int], ControllerTime] = lambda workers: ControllerTime()
    topology: Topology | None = None
    failover_s: float = 1.0
    slo: Slo | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; a fleet needs at least 1")
        if not self.failover_s >= 0:
            raise ValueError(f"failover_s is {self.failover_s}; it must not be negative")
        if not 1 <= self.shards <= self.workers:
            raise ValueError(
                f"{self.shards} shards of {self.workers} workers; give one shard or more, and each a worker or more"
            )

    @property
    def sizes(self) -> list[int]:
        """Workers of each shard: as alike as can be."""
        whole, more = divmod(self.workers, self.shards)
        return [whole + (number < more) for number in range(self.shards)]


@dataclass
class FleetResult:
    """`result` is of all shards; by shard: requests it was offered and seconds its controller was busy.

    messages: of workers that controllers took in
    waits: of every request for a controller's turn, s
    lost_tokens: whose KV was on workers that died; failed_over: requests that went to another shard
    sent_bytes: over each kind of link of the network
    """

    result: SimResult
    offered: list[int]
    busy_s: list[float]
    messages: int
    waits: list[float]
    lost_tokens: int
    failed_over: int
    ended_s: float
    sent_bytes: dict[str, float]


class FleetSimulator:
    """One simulation; `run` it once.

    Args:
        policy: makes one for so many workers, with their roles
        time, requests, config: as of `Simulator`; no request has a deadline
        kills: with names of the fleet: the first shard's workers are the first
        controller_kills: controllers that die
        seed: of the front door

    Raises:
        ValueError: workers or shards that are not there, or a policy with other roles.
    """

    def __init__(
        self,
        fleet: FleetConfig,
        policy: Callable[[int], MakePolicy],
        time: StepTime,
        requests: Iterable[SimRequest],
        config: SimConfig | None = None,
        kills: Iterable[Kill] = (),
        controller_kills: Iterable[ControllerKill] = (),
        seed: int = 0,
    ) -> None:
        self.fleet, self.config = fleet, config or SimConfig()
        self.requests = in_order(requests)
        self.queue = EventQueue()
        self.network = Network(fleet.topology, self.queue) if fleet.topology else None
        self._records: dict[str, RequestRecord] = {}
        self._open = len(self.requests)
        self._arrived, self._over, self.failed_over = 0, False, 0
        sizes = fleet.sizes
        firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        self.offered = [0] * len(sizes)
        self._unhoused: list[tuple[SimRequest, int]] = []  # while no shard is up
        struck = self._by_shard(kills, firsts)
        self.shards = [
            Shard(
                number,
                policy(size),
                time,
                self.queue,
                self.config,
                fleet.busy(size),
                self._settled,
                struck[number],
            )
            for number, size in enumerate(sizes)
        ]
        if self.network is not None:
            for each, first in zip(self.shards, firsts, strict=True):
                each.links = Port(self.config.link, self.queue, each._pull_ended, self.network, first)
        self.door = FrontDoor(fleet.door, sizes, lambda number: self.shards[number].load, self.queue, seed)
        for kill in controller_kills:
            if not 0 <= kill.shard < len(sizes):
                raise ValueError(
                    f"the controller of shard {kill.shard} is to be killed; there are {len(sizes)}"
                )
            self.queue.push(kill.time, Kind.FAULT, partial(self._strike, kill))
        if fleet.slo is not None and self.requests:
            self.queue.push(self.requests[-1].arrival + LOOKS_S, Kind.FAULT, self._look)

    def _by_shard(self, kills: Iterable[Kill], firsts: Sequence[int]) -> list[list[Kill]]:
        found: list[list[Kill]] = [[] for _ in firsts]
        for kill in kills:
            place = int(kill.worker[1:]) if kill.worker[1:].isdigit() else -1
            if not 0 <= place < self.fleet.workers:
                raise ValueError(
                    f"worker {kill.worker!r} is to be killed; there are w0 to w{self.fleet.workers - 1}"
                )
            number = max(number for number, first in enumerate(firsts) if first <= place)
            found[number].append(replace(kill, worker=f"w{place - firsts[number]}"))
        return found

    # ------------------------------------------------------------------ the loop

    def run(self) -> FleetResult:
        """Serve all requests, or those that get served until the end.

        Raises:
            AssertionError, Exception: as of `Simulator.run`.
        """
        with uncollected():
            self.begin()
            self.go_on(lambda: False)
        return self.end()

    def begin(self) -> None:
        """The first request is to come."""
        self._schedule_arrival()
        self._events = self.queue.run()

    def go_on(self, stop: Callable[[], bool]) -> bool:
        """Until `stop()`, or until all is over; True if it is."""
        while self._open and not self._over and not stop():
            if next(self._events, None) is None:
                raise AssertionError(f"stalled at {self.queue.now} s: {self._open} requests open")
        return not self._open or self._over

    def end(self) -> FleetResult:
        """Write down what there is."""
        whole = not self._open
        for each in self.shards:
            for record in each.left_open():
                self._records[record.request_id] = record
        for request, _ in self._unhoused:
            self._records[request.request_id] = RequestRecord(
                request.request_id, request.arrival, request.prompt_tokens, 0, error="no shard is up"
            )
        workers = [totals for each in self.shards for totals in each.close(whole)]
        records = [self._records[each.request_id] for each in self.requests[: self._arrived]]
        result = SimResult(
            records, workers, self.queue.processed, sum(each.decisions for each in self.shards),
            [span for each in self.shards for span in each.spans],
            [pull for each in self.shards for pull in each.pulls],
        )  # fmt: skip
        return FleetResult(
            result,
            self.offered,
            [each.busy_s for each in self.shards],
            sum(each.messages for each in self.shards),
            [wait for each in self.shards for wait in each.waits],
            sum(each.lost_tokens for each in self.shards),
            self.failed_over,
            self.queue.now,
            self.network.sent_bytes if self.network else {},
        )

    def _look(self, _: int) -> None:
        """Has anybody something to hope for?"""
        assert self.fleet.slo is not None
        self._over = not any(each.may_please(self.fleet.slo) for each in self.shards) and not self._unhoused
        self.queue.push(self.queue.now + LOOKS_S, Kind.FAULT, self._look)

    # ------------------------------------------------------------------ requests

    def _schedule_arrival(self) -> None:
        if self._arrived < len(self.requests):
            self.queue.push(self.requests[self._arrived].arrival, Kind.ARRIVAL, self._arrive)

    def _arrive(self, _: int) -> None:
        number = self._arrived
        self._arrived += 1
        self._schedule_arrival()
        self._offer(self.requests[number], number)

    def _offer(self, request: SimRequest, number: int) -> None:
        shard = self.door.choose(request)
        if shard is None:
            self._unhoused.append((request, number))
            return
        self.offered[shard] += 1
        self.shards[shard].offer(request, number)

    def _settled(self, record: RequestRecord) -> None:
        self._open -= 1
        self._records[record.request_id] = record

    # ------------------------------------------------------------------ controllers that die

    def _strike(self, kill: ControllerKill, _: int) -> None:
        shard = self.shards[kill.shard]
        if shard.down:
            return
        shard.fail(kill.restart_s)
        now = self.queue.now
        self.queue.push(now + self.fleet.failover_s, Kind.WAKE, partial(self._give_up, kill.shard))
        self.queue.push(now + kill.restart_s, Kind.WAKE, partial(self._back, kill.shard))

    def _give_up(self, number: int, _: int) -> None:
        """It has not answered for too long."""
        if self.shards[number].down:
            self.door.away(number)
        lost = self.shards[number].take_back()
        self.failed_over += len(lost)
        for request, place in lost:
            self._offer(request, place)

    def _back(self, number: int, _: int) -> None:
        self.door.back(number)
        unhoused, self._unhoused = self._unhoused, []
        for request, place in unhoused:
            self._offer(request, place)
