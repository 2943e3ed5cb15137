"""The relay on simulated GPUs: right bytes in whatever order the streams advance."""

from __future__ import annotations

import pytest
import torch

from nanopd_lab.transfer import pinned
from nanopd_lab.transfer.base import Pool, Pull, PullResult, PullStatus
from nanopd_lab.transfer.pinned import PinnedTransport
from tests.transfer.simulated_gpus import SimulatedEvent, SimulatedGpus


def simulate(
    seed: int, monkeypatch: pytest.MonkeyPatch, blocks: int = 60
) -> tuple[SimulatedGpus, PinnedTransport, Pool, Pool]:
    gpus = SimulatedGpus(seed, monkeypatch)
    generator = torch.Generator().manual_seed(seed)
    memories = (torch.randint(256, (blocks, 24), generator=generator, dtype=torch.uint8) for _ in range(2))
    other, transport = PinnedTransport(), PinnedTransport(slots=3, slot_bytes=24 * 5)
    source, own = (
        Pool(memory, t.generations(blocks)) for memory, t in zip(memories, (other, transport), strict=True)
    )
    transport.register("reader", own)
    transport.connect(other.register("source", source))
    return gpus, transport, source, own


def run(gpus: SimulatedGpus, transport: PinnedTransport, count: int) -> dict[int, PullResult]:
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
    gate.last = []
    gpus.computing.wait_event(gate)
    gpus.copy(own.memory.data_ptr(), junk.data_ptr(), junk.numel(), gpus.computing)
    transport.start(Pull(0, "source", range(60), [0] * 60, range(60)), 1e18)
    gpus.advance(5000)
    assert transport.poll() == []
    gate.last.append(True)
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
