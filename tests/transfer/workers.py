"""Workers for the tests: a pool with recognisable bytes behind a transport, in this process or in one of its own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from nanopd_lab.starting import process_context
from nanopd_lab.transfer.base import Pool, PoolAddress, Pull, PullResult, TransferError, Transport
from nanopd_lab.transfer.nixl_agent import INSTALL, is_installed
from nanopd_lab.transfer.registry import create_transport

SIZE = (3, 2, 8, 16)  # of a block: 1,536 bytes in bf16
FOREVER = 60.0
needs_nixl = pytest.mark.skipif(not is_installed(), reason=f"nixl is not installed: {INSTALL}")


@dataclass
class Worker:
    name: str
    transport: Transport
    pool: Pool
    address: PoolAddress

    @property
    def bytes(self) -> torch.Tensor:
        """The pool on the host, uint8 `[num_blocks, block_bytes]`; a copy."""
        return self.pool.memory.cpu().view(self.pool.memory.shape[0], -1).view(torch.uint8).clone()

    def start(
        self, pull_id: int, source: Worker, blocks: list[int], targets: list[int], **change: Any
    ) -> Pull:
        generations = [source.pool.generations[block] for block in blocks]
        given = {"source": source.name, "generations": generations, "deadline": soon(), **change}
        deadline = given.pop("deadline")
        pull = Pull(pull_id, source_blocks=blocks, target_blocks=targets, **given)
        self.transport.start(pull, deadline)
        return pull


def soon() -> float:
    return time.monotonic() + FOREVER


def make_worker(
    kind: str,
    name: str,
    num_blocks: int,
    pools: MutableMapping[str, Pool] | None = None,
    size: tuple[int, ...] = SIZE,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Worker:
    transport = create_transport(kind, pools=pools, **options)
    memory = transport.allocate((num_blocks, *size), torch.bfloat16, torch.device(device))
    fill(memory, seed)
    pool = Pool(memory, transport.generations(num_blocks))
    return Worker(name, transport, pool, transport.register(name, pool))


def fill(memory: torch.Tensor, seed: int) -> None:
    memory.copy_(contents(memory.shape, seed))
    if memory.is_cuda:
        torch.cuda.synchronize(memory.device)  # published blocks are final


def contents(shape: torch.Size | tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-30000, 30000, tuple(shape), generator=generator, dtype=torch.int16).view(
        torch.bfloat16
    )


def results_of(transport: Transport, count: int) -> dict[int, PullResult]:
    """Poll until so many pulls have ended, then once more; every one exactly once."""
    found: list[PullResult] = []
    until = soon()
    while len(found) < count:
        assert time.monotonic() < until, f"only {len(found)} of {count} pulls have ended: {found}"
        found += transport.poll()
    found += transport.poll()
    assert len({result.pull_id for result in found}) == len(found) == count
    return {result.pull_id: result for result in found}


# ---- a source in a process of its own ----------------------------------------------------------------------


def serve(
    kind: str, name: str, num_blocks: int, size: tuple[int, ...], device: str, seed: int, pipe: Connection
) -> None:
    """Do what the other end of the pipe says."""
    worker = make_worker(kind, name, num_blocks, size=size, device=device, seed=seed)
    pipe.send(worker.address)
    while (command := pipe.recv())[0] != "close":
        pipe.send(_obey(worker, seed, *command))
    worker.transport.close()


def _obey(worker: Worker, seed: int, command: str, *given: Any) -> Any:
    if command == "refill":  # hands out every block again, as an allocator would
        for block in range(worker.pool.memory.shape[0]):
            worker.pool.generations[block] += 1
        fill(worker.pool.memory, seed + 1)
    elif command == "connect":
        try:
            worker.transport.connect(*given)
        except TransferError as error:
            return error
    elif command == "disconnect":
        worker.transport.disconnect(*given)
    elif command == "pull":  # pull_id, source, blocks, targets, seconds; all of generation 0
        pull_id, source, blocks, targets, *seconds = given
        deadline = time.monotonic() + seconds[0] if seconds else soon()
        worker.transport.start(Pull(pull_id, source, blocks, [0] * len(blocks), targets), deadline)
    elif command == "results":
        return results_of(worker.transport, *given)
    elif command == "holds":  # in these blocks, those of a pool that was filled from this seed
        targets, seed_of_source, blocks = given
        wanted = contents(worker.pool.memory.shape, seed_of_source)
        return torch.equal(worker.bytes[targets], wanted.view(len(wanted), -1).view(torch.uint8)[blocks])
    return None


@dataclass
class Remote:
    """A worker elsewhere, as the reader knows it."""

    name: str
    address: PoolAddress
    process: Any
    pipe: Connection
    expected: torch.Tensor = field(repr=False)

    def ask(self, *command: Any) -> Any:
        self.pipe.send(command)
        if command[0] == "close":
            return self.process.join()
        assert self.pipe.poll(FOREVER), f"{self.name} does not answer {command[0]}"
        return self.pipe.recv()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


@contextmanager
def remote_worker(
    kind: str, name: str, num_blocks: int, size: tuple[int, ...] = SIZE, device: str = "cpu", seed: int = 0
) -> Iterator[Remote]:
    """A spawned process with a pool; killed at the end if it has not ended by itself."""
    context = process_context([device])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(kind, name, num_blocks, size, device, seed, theirs))
    process.start()
    theirs.close()
    try:
        assert ours.poll(FOREVER), "the worker did not start"
        expected = contents((num_blocks, *size), seed).view(num_blocks, -1).view(torch.uint8)
        yield Remote(name, ours.recv(), process, ours, expected)
    finally:
        process.kill()
        process.join()
