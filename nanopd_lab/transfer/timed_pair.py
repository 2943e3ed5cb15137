"""A source and a reader with a transport between them, in one process or two, and a pull that is timed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

import torch

from nanopd_lab.starting import process_context
from nanopd_lab.transfer.base import Pool, PoolAddress, Pull, PullStatus
from nanopd_lab.transfer.device_memory import can_reach, open_memory
from nanopd_lab.transfer.registry import NETWORKED, create_transport
from nanopd_lab.transfer.segments import map_tensor
from nanopd_lab.transfer.timed_plan import Plan


class Pair:
    """A connected reader, and the source's memory as the reader's process sees it."""

    def __init__(self, name: str, plan: Plan, address: PoolAddress, pools: dict[str, Pool]) -> None:
        self.name, self.plan = name, plan
        self.reader = create_transport(name, pools=pools)
        self.own = plan.pool(self.reader, plan.target, 0)
        self.reader.register("reader", self.own)
        self.reader.connect(address)
        self._pull_ids = iter(range(1 << 40))
        self._random = random.Random(0)
        self.release: Callable[[], None] | None = None
        self.stack = ExitStack()  # of what the yardstick needs
        self.source = (
            self.own.memory
        )  # of those between machines nothing is here, and no yardstick asks for it
        if name == "inproc":
            self.source = pools[address.worker].memory
        elif name == "shm":
            self.source = map_tensor(address.details["memory"])
        elif name not in NETWORKED:
            through = plan.target if can_reach(plan.target, plan.source) else plan.source
            shape = (address.num_blocks, address.block_bytes)
            self.source, self.release = open_memory(address.details["memory"], shape, through)

    def pull(self, tokens: int, in_flight: int, check: bool = False) -> float:
        """Seconds for each of so many pulls."""
        blocks, count = range(self.plan.num_blocks), -(-tokens // self.plan.shape.block_size)
        pulls = [
            Pull(
                next(self._pull_ids), "source", self._random.sample(blocks, count), [0] * count,
                self._random.sample(blocks, count),
            )
            for _ in range(in_flight)
        ]  # fmt: skip
        by_threads = self.plan.target.type == "cpu" or self.name in NETWORKED
        ended = 0
        begun = time.perf_counter()
        for pull in pulls:
            self.reader.start(pull, time.monotonic() + 60)
        while ended < in_flight:
            for result in self.reader.poll():
                if result.status is not PullStatus.DONE:
                    raise RuntimeError(f"{self.name}: {result}")
                ended += 1
            if by_threads:
                time.sleep(2e-5)  # what copies needs Python's lock between its pieces
        if self.name == "inproc" and self.plan.target.type != "cpu":  # its copies are ordered on the stream
            torch.cuda.synchronize(self.plan.target)
        seconds = time.perf_counter() - begun
        if check:
            arrived = self.own.memory[list(pulls[-1].target_blocks)].view(torch.int16).view(count, -1)
            wanted = torch.tensor(pulls[-1].source_blocks, dtype=torch.int16, device=arrived.device)
            if not bool((arrived == wanted[:, None]).all()):
                raise RuntimeError(f"{self.name}: the wrong bytes arrived")
        return seconds / in_flight

    def close(self) -> None:
        """Both ends."""
        if self.release is not None:
            self.release()
        self.reader.close()
        self.stack.close()


def _source_process(names: Sequence[str], plan: Plan, pipe: Connection) -> None:
    transports = [create_transport(name) for name in names]
    pools = [plan.pool(transport, plan.source, 0) for transport in transports]
    pipe.send([t.register("source", pool) for t, pool in zip(transports, pools, strict=True)])
    pipe.recv()
    for transport in transports:
        transport.close()


@contextmanager
def sources(
    names: Sequence[str], plan: Plan, processes: int
) -> Iterator[list[tuple[PoolAddress, dict[str, Pool]]]]:
    """A source for each transport, in this process or in one spawned for all: its address, and the pools that readers
    in its own process share with it."""
    with ExitStack() as stack:
        shared: list[dict[str, Pool]] = [{} for _ in names]
        if processes == 1:
            transports = [
                create_transport(name, pools=pools) for name, pools in zip(names, shared, strict=True)
            ]
            addresses = [t.register("source", plan.pool(t, plan.source, 0)) for t in transports]
            for transport in transports:
                stack.callback(transport.close)
        else:
            context = process_context([str(plan.source), str(plan.target)])
            ours, theirs = context.Pipe()
            process = context.Process(target=_source_process, args=(names, plan, theirs), daemon=True)
            process.start()
            stack.callback(process.join)
            theirs.close()
            addresses = ours.recv()
            stack.callback(ours.send, "close")
        yield list(zip(addresses, shared, strict=True))


@contextmanager
def connected(names: Sequence[str], plan: Plan, processes: int) -> Iterator[list[Pair]]:
    """A reader in this process for each source."""
    with sources(names, plan, processes) as found, ExitStack() as stack:
        pairs = []
        for name, (address, pools) in zip(names, found, strict=True):
            pairs.append(Pair(name, plan, address, pools))
            stack.callback(pairs[-1].close)
        yield pairs
