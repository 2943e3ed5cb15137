"""Workers without numbers: real controller, workers, schedulers and allocators over the digest cache of
`tests.engine.symbolic`, so that a wrong, stale or foreign KV block shows at once, and thousands of requests take
seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nanopd_lab.cluster.actions import Emit, Limits, Settled
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.host import WorkerHost
from nanopd_lab.cluster.inline import InlineLauncher
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.cluster.messages import Capacity
from nanopd_lab.cluster.worker import WorkerCore
from nanopd_lab.core import SampledToken, SamplingParams, StepPlan
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.kv import BlockAllocator
from nanopd_lab.router import Policy, Role
from nanopd_lab.transfer import PoolAddress, Pull, PullResult, PullStatus, TransferError
from tests.engine.symbolic import EOS, SymbolicRunner


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Done:
    plan: StepPlan
    sampled: list[list[SampledToken]]

    def result(self) -> list[list[SampledToken]]:
        return self.sampled


class Runner(SymbolicRunner):
    """Runs a plan when it is launched; `broken` makes launches raise."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__(num_blocks, block_size)
        self.broken = 0

    def launch(self, plan: StepPlan) -> Done:
        if self.broken:
            self.broken -= 1
            raise RuntimeError("the device is on fire")
        return Done(plan, self.execute(plan))


class Wire:
    """The pools of all workers, and what goes wrong between them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.pools: dict[str, tuple[Runner, BlockAllocator]] = {}
        self.fault: Callable[[Pull], str | None] = lambda pull: None  # "fail", "late" or None


class SymbolicTransport:
    """Copies when polled, some blocks whenever time has passed, as a slow link would."""

    name = "symbolic"

    def __init__(self, wire: Wire, runner: Runner, per_poll: int = 2) -> None:
        self.wire, self.runner, self.per_poll = wire, runner, per_poll
        self.under_way: dict[int, tuple[Pull, float, float, int, str | None]] = {}
        self.cancelled: set[int] = set()
        self.last = wire.clock()

    def connect(self, address: PoolAddress) -> None:
        pass

    def disconnect(self, worker: str) -> None:
        pass

    def start(self, pull: Pull, deadline: float) -> None:
        if pull.source not in self.wire.pools:
            raise TransferError(f"not connected to {pull.source}")
        self.under_way[pull.pull_id] = (pull, deadline, self.wire.clock(), 0, self.wire.fault(pull))

    def poll(self) -> list[PullResult]:
        found: list[PullResult] = []
        moves, self.last = self.wire.clock() > self.last, self.wire.clock()
        for number, (pull, deadline, started, done, fault) in list(self.under_way.items()):
            now = self.wire.clock()

            def ended(status: PullStatus, error: str | None = None, size: int = 0) -> None:
                found.append(PullResult(number, status, started, now, size, error))  # noqa: B023
                del self.under_way[number]  # noqa: B023

            if number in self.cancelled:
                ended(PullStatus.FAILED, "cancelled")
            elif pull.source not in self.wire.pools:
                ended(PullStatus.FAILED, "the source is gone")
            elif fault == "fail" and moves:
                ended(PullStatus.FAILED, "the link broke")
            elif now >= deadline:
                ended(PullStatus.FAILED, "deadline")
            elif fault != "late" and moves:
                runner, allocator = self.wire.pools[pull.source]
                size, stop = runner.block_size, min(done + self.per_poll, len(pull.source_blocks))
                for i in range(done, stop):
                    here, there = pull.target_blocks[i] * size, pull.source_blocks[i] * size
                    self.runner.cache[here : here + size] = runner.cache[there : there + size]
                self.under_way[number] = (pull, deadline, started, stop, fault)
                if stop == len(pull.source_blocks):
                    same = all(
                        allocator.generation(block) == generation
                        for block, generation in zip(pull.source_blocks, pull.generations, strict=True)
                    )
                    ended(PullStatus.DONE if same else PullStatus.STALE, None, stop if same else 0)
        return found

    def cancel(self, pull_id: int) -> None:
        self.cancelled.add(pull_id)

    def close(self) -> None:
        self.under_way.clear()


@dataclass
class Sizes:
    num_blocks: int = 24
    block_size: int = 4
    budget: int = 8
    seqs: int = 6
    caching: bool = True
    ahead: bool = False
    per_poll: int = 2


class Harness:
    """A cluster of symbolic workers, with everything that callers have been told."""

    def __init__(
        self,
        policy: Policy,
        roles: list[Role],
        sizes: Sizes | None = None,
        limits: Limits | None = None,
        terms: LeaseTerms | None = None,
        max_restarts: int = 0,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """`blocks`: of each worker's pool, where they are not alike."""
        self.sizes = sizes or Sizes()
        self.terms = terms or LeaseTerms()
        self.clock = Clock()
        self.wire = Wire(self.clock)
        names = [f"w{number}" for number in range(len(roles))]
        self.blocks = dict(zip(names, blocks or [self.sizes.num_blocks] * len(roles), strict=True))
        self.controller = Controller(policy, dict(zip(names, roles, strict=True)), limits)
        self.generation = 0
        self.launcher = InlineLauncher(self.controller, self._host, names, self.clock, max_restarts)
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], Emit] = {}
        self.settled: dict[tuple[str, int], Settled] = {}

    def _host(self, name: str) -> WorkerHost:
        sizes, num_blocks = self.sizes, self.blocks[name]
        allocator = BlockAllocator(num_blocks, sizes.caching)
        scheduler = HandoverScheduler(
            allocator,
            block_size=sizes.block_size,
            max_num_batched_tokens=sizes.budget,
            max_num_seqs=sizes.seqs,
            max_model_len=10_000,
            eos_token_ids=frozenset({EOS}),
        )
        self.generation += (
            1 << 32
        )  # as hosts do: what an earlier life of a worker published is never valid again
        allocator.generations = [self.generation] * num_blocks
        runner = Runner(num_blocks, sizes.block_size)
        self.wire.pools[name] = runner, allocator
        capacity = Capacity(num_blocks, sizes.block_size, sizes.seqs, sizes.budget, 10_000)
        return WorkerHost(
            WorkerCore(name, scheduler, self.terms),
            runner,
            SymbolicTransport(self.wire, runner, sizes.per_poll),  # type: ignore[arg-type]
            capacity,
            ahead=sizes.ahead,
            pull_seconds=5.0,
            clock=self.clock,
        )

    def submit(
        self, name: str, prompt: list[int], params: SamplingParams, patience: float = float("inf")
    ) -> None:
        self.controller.submit(name, prompt, params, self.clock(), self.clock() + patience)
        self.launcher.collect()
        self.take_events()

    def kill(self, name: str) -> None:
        self.wire.pools.pop(name, None)
        self.launcher.kill(name)
        self.take_events()

    def step(self, seconds: float = 0.01) -> None:
        self.clock.now += seconds
        self.launcher.events = self.launcher.step()
        self.take_events()

    def take_events(self) -> None:
        events, self.launcher.events = self.launcher.events, []
        for event in events:
            if isinstance(event, Emit):
                key = event.request_id, event.index
                assert key not in self.ends, "something comes after the end"
                self.tokens.setdefault(key, []).extend(token.token for token in event.tokens)
                if event.finish_reason is not None:
                    self.ends[key] = event
            elif isinstance(event, Settled):
                self.settled[event.request_id, event.index] = event

    def run(self, steps: int = 2_000) -> None:
        """Until everything has settled; a hang fails."""
        for _ in range(steps):
            if not self.controller.num_unsettled:
                break
            self.step()
        else:
            raise AssertionError(f"not done after {steps} steps: {list(self.controller._jobs)}")
        for _ in range(3):  # the last messages
            self.step()
        self.check()
        self.check_empty()

    def check(self) -> None:
        self.controller.check_integrity()
        for host in self.launcher.hosts.values():
            host.core.check_integrity()

    def check_empty(self) -> None:
        """Nothing is held by anybody."""
        for name, host in self.launcher.hosts.items():
            assert host.core.idle, f"{name} still holds something"
            stats = host.core.scheduler.allocator.stats()
            assert stats.used == 0, f"{name} leaks {stats.used} blocks"
        for view in self.controller.views():
            assert view.jobs == 0, f"{view} still counts jobs"
