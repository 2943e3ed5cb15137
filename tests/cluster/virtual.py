"""The cluster that really runs, in virtual time: controller, hosts, loops of steps, schedulers, allocators, and a model
of symbols. Only time is made up, by the cost model, the links and the delay of the simulator, to be laid beside it.

A host's turn is computed when it begins, and what it has to say is delivered when its step ends. Nobody sees the
difference, as hosts speak through messages and pulled blocks only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from nanopd_lab.cluster.actions import Action, Emit, Send, Settled
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.host import WorkerHost
from nanopd_lab.cluster.messages import Capacity, FromWorker, ToWorker
from nanopd_lab.cluster.worker import WorkerCore
from nanopd_lab.core import SampledToken, StepPlan
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.kv import BlockAllocator
from nanopd_lab.router import Policy, Role
from nanopd_lab.sim import SimConfig, SimRequest, StepTime
from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.links import Flow, Links
from nanopd_lab.transfer import PoolAddress, Pull, PullResult, PullStatus, TransferError
from tests.engine.symbolic import SymbolicRunner


@dataclass(frozen=True)
class RoleChange:
    """From outside, at `time` (s)."""

    time: float
    worker: str
    role: Role


class LocalClock:
    """A host's: it runs ahead of the others' to the end of the step that it waits for."""

    def __init__(self, queue: EventQueue) -> None:
        self.queue, self.until = queue, 0.0

    def __call__(self) -> float:
        return max(self.queue.now, self.until)


@dataclass(frozen=True)
class Timed:
    """A step on its way."""

    plan: StepPlan
    sampled: list[list[SampledToken]]
    end: float
    clock: LocalClock

    def result(self) -> list[list[SampledToken]]:
        self.clock.until = max(self.clock(), self.end)
        return self.sampled


class TimedRunner(SymbolicRunner):
    """A device that does one step after the other."""

    def __init__(self, config: SimConfig, time: StepTime, clock: LocalClock) -> None:
        super().__init__(config.num_blocks, config.block_size)
        self.time, self.clock, self.free_at = time, clock, 0.0

    def launch(self, plan: StepPlan) -> Timed:
        seconds = self.time.seconds([(chunk.start, chunk.count) for chunk in plan.chunks])
        self.free_at = max(self.clock(), self.free_at) + seconds
        return Timed(plan, self.execute(plan), self.free_at, self.clock)


class LinkTransport:
    """Copies blocks when the links say that they have arrived."""

    name = "links"

    def __init__(self, cluster: VirtualCluster, worker: str) -> None:
        self.cluster, self.worker = cluster, worker
        self.results: list[PullResult] = []
        self.flows: dict[int, Flow] = {}

    def connect(self, address: PoolAddress) -> None:
        pass

    def disconnect(self, worker: str) -> None:
        pass

    def start(self, pull: Pull, deadline: float) -> None:
        if pull.source not in self.cluster.hosts:
            raise TransferError(f"not connected to {pull.source}")
        blocks = len(pull.source_blocks)
        size = blocks * self.cluster.config.block_bytes
        self.flows[pull.pull_id] = self.cluster.links.start(
            pull.source, self.worker, blocks, size, (self, pull)
        )

    def arrived(self, pull: Pull, started: float) -> None:
        """Take in a pull's blocks, if they are still what was published."""
        del self.flows[pull.pull_id]
        source, target = (self.cluster.runners[name] for name in (pull.source, self.worker))
        allocator, size = self.cluster.allocators[pull.source], target.block_size
        status = PullStatus.STALE
        if [*map(allocator.generation, pull.source_blocks)] == [*pull.generations]:
            status = PullStatus.DONE
            for here, there in zip(pull.target_blocks, pull.source_blocks, strict=True):
                target.cache[here * size : (here + 1) * size] = source.cache[
                    there * size : (there + 1) * size
                ]
        moved = len(pull.source_blocks) * self.cluster.config.block_bytes if status is PullStatus.DONE else 0
        self.results.append(PullResult(pull.pull_id, status, started, self.cluster.queue.now, moved))

    def poll(self) -> list[PullResult]:
        found, self.results = self.results, []
        return found

    def cancel(self, pull_id: int) -> None:
        if (flow := self.flows.pop(pull_id, None)) is not None:
            self.cluster.links.end(flow)
            now = self.cluster.queue.now
            self.results.append(PullResult(pull_id, PullStatus.FAILED, flow.started, now, error="cancelled"))

    def close(self) -> None:
        assert not self.flows


class VirtualCluster:
    """Serves requests as the simulator of the same arguments does; `run` it once. `tokens` has what callers got.

    A message takes `config.message_s`, which must not be 0: a host does not wait for an answer before its next step.
    """

    def __init__(
        self,
        policy: Policy,
        roles: Sequence[Role],
        time: StepTime,
        requests: Sequence[SimRequest],
        config: SimConfig,
        changes: Iterable[RoleChange] = (),
    ) -> None:
        assert config.message_s > 0
        self.config, self.time, self.requests = config, time, requests
        self.queue = EventQueue()
        self.links = Links(config.link, self.queue, self._pull_ended)
        self.names = [f"w{number}" for number in range(len(roles))]
        self.controller = Controller(policy, dict(zip(self.names, roles, strict=True)), config.limits)
        self.runners: dict[str, TimedRunner] = {}
        self.allocators: dict[str, BlockAllocator] = {}
        self.tokens: dict[str, list[int]] = {}
        self.settled: dict[str, Settled] = {}
        self.inboxes: dict[str, list[ToWorker]] = {name: [] for name in self.names}
        self.said: dict[str, list[FromWorker]] = {
            name: [] for name in self.names
        }  # behind the step under way
        self._turns: dict[str, int] = {}  # the order of each worker's next turn
        self.hosts: dict[str, WorkerHost] = {}
        for name in self.names:
            self.hosts[name] = self._host(name)
            self.controller.handle(name, self.hosts[name].hello(), 0.0)
        for number, request in enumerate(requests):
            self.queue.push(request.arrival, Kind.ARRIVAL, partial(self._arrive, number, request))
        for change in changes:
            self.queue.push(change.time, Kind.FAULT, partial(self._change, change))

    def run(self) -> None:
        for _ in self.queue.run():
            if len(self.settled) == len(self.requests):
                break
        assert len(self.settled) == len(self.requests), "stalled"
        self.controller.check_integrity()
        for name, host in self.hosts.items():
            host.core.check_integrity()
            assert host.core.idle
            assert self.allocators[name].stats().used == 0
            host.close()

    def _host(self, name: str) -> WorkerHost:
        config = self.config
        clock = LocalClock(self.queue)
        allocator = self.allocators[name] = BlockAllocator(config.num_blocks, config.enable_prefix_caching)
        runner = self.runners[name] = TimedRunner(config, self.time, clock)
        sizes = config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len
        scheduler = HandoverScheduler(
            allocator,
            block_size=config.block_size,
            max_num_seqs=sizes[0],
            max_num_batched_tokens=sizes[1],
            max_model_len=sizes[2],
        )
        return WorkerHost(
            WorkerCore(name, scheduler, config.terms),
            runner,
            LinkTransport(self, name),  # type: ignore[arg-type]
            Capacity(config.num_blocks, config.block_size, *sizes, config.block_bytes),
            ahead=config.ahead,
            clock=clock,
            post=partial(self._say, name),
        )

    # ------------------------------------------------------------------ callers

    def _arrive(self, number: int, request: SimRequest, _: int) -> None:
        prompt = request.prompt(number).tolist()
        self.controller.submit(request.request_id, prompt, request.params(), self.queue.now)
        self._collect()

    def _change(self, change: RoleChange, _: int) -> None:
        self.controller.set_role(change.worker, change.role, self.queue.now)
        self._collect()

    # ------------------------------------------------------------------ messages

    def _say(self, name: str, messages: Sequence[FromWorker]) -> None:
        for message in messages:
            self._later(Kind.MESSAGE, self.config.message_s, partial(self._heard, name, message))

    def _heard(self, name: str, message: FromWorker, _: int) -> None:
        self.controller.handle(name, message, self.queue.now)
        self._collect()

    def _collect(self) -> None:
        actions: list[Action] = self.controller.actions
        self.controller.actions = []
        for action in actions:
            if isinstance(action, Send):
                come = partial(self._come, action.worker, action.message)
                self._later(Kind.MESSAGE, self.config.message_s, come)
            elif isinstance(action, Emit):
                assert action.error is None, action.error
                self.tokens.setdefault(action.request_id, []).extend(each.token for each in action.tokens)
            elif isinstance(action, Settled):
                self.settled[action.request_id] = action

    def _come(self, name: str, message: ToWorker, _: int) -> None:
        self.inboxes[name].append(message)
        self._wake(name)

    # ------------------------------------------------------------------ workers

    def _turn(self, name: str, order: int) -> None:
        """The last turn's step has ended, or something woke the worker: it speaks, and has its next turn."""
        if self._turns.get(name) != order:
            return
        del self._turns[name]
        self._say(name, self.said[name])
        host, taken = self.hosts[name], self.inboxes[name]
        self.inboxes[name] = []
        self.said[name] = host.turn(taken)
        if host.progressed:
            self._turns[name] = self._later(
                Kind.LOOP, host.clock() - self.queue.now, partial(self._turn, name), name
            )
            return
        self._say(name, self.said[name])
        self.said[name] = []
        if (due := host.core.next_wakeup()) is not None:
            self._later(Kind.WAKE, due - self.queue.now, partial(self._wake, name))

    def _pull_ended(self, flow: Flow) -> None:
        assert isinstance(flow.payload, tuple)
        transport, pull = flow.payload
        assert isinstance(transport, LinkTransport)
        transport.arrived(pull, flow.started)
        self._wake(transport.worker)

    def _wake(self, name: str, _: int = 0) -> None:
        if name not in self._turns:
            self._turns[name] = self._later(Kind.LOOP, 0.0, partial(self._turn, name), name)

    def _later(
        self, kind: Kind, seconds: float, happen: Callable[[int], None], name: str | None = None
    ) -> int:
        rank = 0 if name is None else self.names.index(name)
        return self.queue.push(self.queue.now + max(0.0, seconds), kind, happen, rank)
