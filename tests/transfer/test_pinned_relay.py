"""The relay on a simulated pair of GPUs: streams advance in random order and wait for nothing but events.

A wait that is missing, or an event recorded too early, lets a slot be overwritten before it was copied out or read
before it was filled, in some of the orders; the bytes then show it.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections import deque
from typing import Any

import pytest
import torch

from nanopd_lab.transfer import pinned
from nanopd_lab.transfer.base import Pool, PoolAddress, Pull, PullResult, PullStatus
from nanopd_lab.transfer.pinned import PinnedTransport
from nanopd_lab.transfer.pulls import Peer


class SimulatedStream:
    device = torch.device("cpu")

    def __init__(self, gpus: SimulatedGpus) -> None:
        self.work: deque[tuple[str, Any]] = deque()
        gpus.streams.append(self)

    def wait_event(self, event: SimulatedEvent) -> None:
        self.work.append(("wait", event))

    def wait_stream(self, other: SimulatedStream) -> None:
        event = SimulatedEvent()
        event.record(other)
        self.wait_event(event)

    def step(self) -> bool:
        """Do the first thing in the queue; False if there is none or it must wait."""
        if not self.work or (self.work[0][0] == "wait" and not self.work[0][1].query()):
            return False
        what, given = self.work.popleft()
        if what == "copy":
            ctypes.memmove(*given)
        elif what == "record":
            given.passed = True
        return True

    def synchronize(self) -> None:
        raise AssertionError("nothing in these tests may wait on the host")


class SimulatedEvent:
    passed = True  # as CUDA has it for an event never recorded

    def record(self, stream: SimulatedStream) -> None:
        self.passed = False
        stream.work.append(("record", self))

    def query(self) -> bool:
        return self.passed


class SimulatedGpus:
    """Two devices, 'a' the source's and 'b' the reader's."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[SimulatedStream] = []
        self.computing = SimulatedStream(self)
        self.enqueued = 0

    def copy(self, target: int, source: int, num_bytes: int, stream: SimulatedStream) -> None:
        stream.work.append(("copy", (target, source, num_bytes)))

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.random.choice(self.streams).step()


class SimulatedPinned(PinnedTransport):
    _pinned = staticmethod(lambda num_bytes: torch.zeros(num_bytes, dtype=torch.uint8))

    def _check_cuda(self, device: torch.device) -> None:
        pass

    def _open(self, address: PoolAddress) -> Peer:
        pool = address.details["pool"]
        self._through(pool.memory.device, address.worker)
        return Peer(address.worker, pool)


def simulate(
    seed: int, monkeypatch: pytest.MonkeyPatch, blocks: int = 60
) -> tuple[SimulatedGpus, Any, Pool, Pool]:
    gpus = SimulatedGpus(seed)
    monkeypatch.setattr(pinned, "copy_async", gpus.copy)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: SimulatedStream(gpus))
    monkeypatch.setattr(torch.cuda, "Event", SimulatedEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: gpus.computing)
    monkeypatch.setattr("nanopd_lab.transfer.cuda_pools.export_memory", lambda memory: {})
    generator = torch.Generator().manual_seed(seed)
    memories = (torch.randint(256, (blocks, 24), generator=generator, dtype=torch.uint8) for _ in range(2))
    transport = SimulatedPinned(slots=3, slot_bytes=24 * 5)
    monkeypatch.setattr(transport, "_synchronize", lambda: None)
    source, own = (Pool(memory, transport.generations(blocks)) for memory in memories)
    transport.register("reader", own)
    transport.connect(PoolAddress("source", "pinned", blocks, 24, {"pool": source}))
    return gpus, transport, source, own


def run(gpus: SimulatedGpus, transport: SimulatedPinned, count: int) -> dict[int, PullResult]:
    found: list[PullResult] = []
    for _ in range(10_000):
        gpus.advance(gpus.random.randint(1, 20))
        found += transport.poll()
        if len(found) == count:
            return {result.pull_id: result for result in found}
    raise AssertionError(f"the relay is stuck: {found}")


@pytest.mark.parametrize("seed", range(30))
def test_right_bytes_in_every_order(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "MAX_AHEAD", 20)
    gpus, transport, source, own = simulate(seed, monkeypatch)
    expected = own.memory.clone()
    targets = gpus.random.sample(range(60), 60)
    for pull_id, count in enumerate((1, 33, 2, 24)):
        first = gpus.random.randint(0, 60 - count)
        blocks = list(range(first, first + count)) if pull_id % 2 else gpus.random.sample(range(60), count)
        mine, targets = sorted(targets[:count]), targets[count:]
        transport.start(Pull(pull_id, "source", blocks, [0] * count, mine), 1e18)
        expected[mine] = source.memory[blocks]
        gpus.advance(gpus.random.randint(0, 5))
    results = run(gpus, transport, 4)
    assert all(result.status is PullStatus.DONE for result in results.values())
    assert torch.equal(own.memory, expected)
    transport.close()


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_written_after_a_cancelled_pull_was_reported(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus, transport, _, own = simulate(seed, monkeypatch)
    transport.start(Pull(0, "source", range(60), [0] * 60, range(60)), 1e18)
    gpus.advance(gpus.random.randint(0, 60))
    transport.cancel(0)
    assert run(gpus, transport, 1)[0].status is PullStatus.FAILED
    own.memory.fill_(7)  # its owner gives the blocks to somebody else
    gpus.advance(2000)
    assert (own.memory == 7).all()
    transport.close()


def test_work_of_the_last_owner_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, transport, source, own = simulate(0, monkeypatch)
    gate, junk = SimulatedEvent(), torch.full((60, 24), 9, dtype=torch.uint8)
    gate.passed = False
    gpus.computing.wait_event(gate)
    gpus.copy(own.memory.data_ptr(), junk.data_ptr(), junk.numel(), gpus.computing)
    transport.start(Pull(0, "source", range(60), [0] * 60, range(60)), 1e18)
    gpus.advance(5000)
    assert transport.poll() == []
    gate.passed = True
    assert run(gpus, transport, 1)[0].status is PullStatus.DONE
    assert torch.equal(own.memory, source.memory)
    transport.close()


def test_not_more_is_enqueued_than_the_driver_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "MAX_AHEAD", 12)
    gpus, transport, *_ = simulate(0, monkeypatch)
    for pull_id in range(4):
        transport.start(Pull(pull_id, "source", range(60), [0] * 60, range(60)), 1e18)
    assert sum(what == "copy" for stream in gpus.streams for what, _ in stream.work) <= 2 * (12 + 5)
    assert len(run(gpus, transport, 4)) == 4
    transport.close()
