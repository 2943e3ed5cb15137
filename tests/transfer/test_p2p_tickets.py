"""Pulls on simulated GPUs that share what earlier ones have left: event and ids are used again, never too early."""

from __future__ import annotations

import pytest
import torch

from nanopd_lab.transfer.base import Pool, Pull, PullStatus
from nanopd_lab.transfer.p2p import P2PTransport
from tests.transfer.simulated_gpus import SimulatedEvent, SimulatedGpus

BLOCKS = 1500  # more than a ticket has place for


def simulate(seed: int, monkeypatch: pytest.MonkeyPatch) -> tuple[SimulatedGpus, P2PTransport, Pool, Pool]:
    gpus = SimulatedGpus(seed, monkeypatch)
    generator = torch.Generator().manual_seed(seed)
    other, transport = P2PTransport(), P2PTransport()
    source, own = (
        Pool(torch.randint(256, (BLOCKS, 16), generator=generator, dtype=torch.uint8), t.generations(BLOCKS))
        for t in (other, transport)
    )
    transport.register("reader", own)
    transport.connect(other.register("source", source))
    return gpus, transport, source, own


@pytest.mark.parametrize("seed", range(20))
def test_right_bytes_whenever_pulls_end(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, transport, source, own = simulate(seed, monkeypatch)
    expected, under_way = own.memory.clone(), {}
    free = set(range(BLOCKS))
    for pull_id in range(60):
        count = min(len(free), gpus.random.choice((1, 5, 40, 700)))
        if count:
            targets = gpus.random.sample(sorted(free), count)
            blocks = gpus.random.choices(range(BLOCKS), k=count)
            transport.start(Pull(pull_id, "source", blocks, [0] * count, targets), 1e18)
            expected[targets] = source.memory[blocks]
            under_way[pull_id] = targets
            free -= set(targets)
        gpus.advance(gpus.random.randint(0, 12))
        for result in transport.poll():
            assert result.status is PullStatus.DONE
            ended = under_way.pop(result.pull_id)
            assert torch.equal(own.memory[ended], expected[ended])
            free |= set(ended)
    transport.close()
    assert {result.pull_id for result in transport.poll()} == set(under_way)
    assert torch.equal(own.memory, expected)


def test_work_of_the_last_owner_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, transport, source, own = simulate(0, monkeypatch)
    gate, junk = SimulatedEvent(), torch.full((BLOCKS, 16), 9, dtype=torch.uint8)
    gate.last = []
    transport.start(Pull(0, "source", [3], [0], [4]), 1e18)
    gpus.computing.wait_event(gate)
    gpus.copy(own.memory.data_ptr(), junk.data_ptr(), junk.numel(), gpus.computing)
    transport.start(Pull(1, "source", range(BLOCKS), [0] * BLOCKS, range(BLOCKS)), 1e18)
    gpus.advance(2000)
    assert [result.pull_id for result in transport.poll()] == [0]
    gate.last.append(True)
    gpus.advance(2000)
    assert [(result.pull_id, result.status) for result in transport.poll()] == [(1, PullStatus.DONE)]
    assert torch.equal(own.memory, source.memory)
    transport.close()
