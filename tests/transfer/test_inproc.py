"""The deterministic transport: random interleavings against a model, and the hooks for faults."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nanopd_lab.transfer.base import Pool, Pull, PullStatus, TransferError
from nanopd_lab.transfer.inproc import InprocTransport

BLOCKS = 6


class Interleavings(RuleBasedStateMachine):
    """A source that keeps handing out its blocks and a reader that pulls them. Every result is predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.pools: dict[str, Pool] = {}
        self.source = self.worker("source", 100)
        self.reader = self.worker("reader", 0)
        self.reader.connect(self.address)
        self.expected = self.pools["reader"].memory.clone()
        self.open: dict[int, tuple[Pull, float]] = {}
        self.stopped: set[int] = set()
        self.started = self.reported = 0

    def worker(self, name: str, first: int) -> InprocTransport:
        transport = InprocTransport(self.pools, clock=lambda: self.now)
        memory = transport.allocate((BLOCKS, 4), torch.int64, torch.device("cpu"))
        memory.copy_(first + torch.arange(BLOCKS)[:, None])
        self.address = transport.register(name, Pool(memory, transport.generations(BLOCKS)))
        if name == "reader":
            self.address = self.source_address
        else:
            self.source_address = self.address
        return transport

    @rule(pairs=st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1)), min_size=1, max_size=4,
                         unique_by=lambda pair: pair[1]), patience=st.integers(0, 5))  # fmt: skip
    def start(self, pairs: list[tuple[int, int]], patience: int) -> None:
        blocks, targets = [list(x) for x in zip(*pairs, strict=True)]
        generations = [self.pools["source"].generations[block] for block in blocks]
        pull = Pull(self.started, "source", blocks, generations, targets)
        try:
            self.reader.start(pull, self.now + patience)
        except TransferError:
            assert not self.connected
            return
        assert self.connected
        self.open[self.started] = (pull, self.now + patience)
        self.started += 1

    @rule(block=st.integers(0, BLOCKS - 1))
    def hand_out_again(self, block: int) -> None:
        pool = self.pools["source"]
        pool.generations[block] += 1
        pool.memory[block] = 1000 * pool.generations[block] + block

    @rule(pull_id=st.integers(0, 20))
    def cancel(self, pull_id: int) -> None:
        self.reader.cancel(pull_id)
        if pull_id in self.open:
            self.stopped.add(pull_id)

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    connected = True

    @rule()
    def disconnect(self) -> None:
        self.reader.disconnect("source")
        self.stopped |= set(self.open)
        self.connected = False

    @rule()
    def connect(self) -> None:
        self.reader.connect(self.source_address)
        self.stopped |= set(self.open)
        self.connected = True

    @rule()
    def poll(self) -> None:
        pool = self.pools["source"]
        results = self.reader.poll()
        assert [result.pull_id for result in results] == list(self.open)
        for result in results:
            pull, deadline = self.open.pop(result.pull_id)
            if result.pull_id in self.stopped or self.now > deadline:
                assert result.status is PullStatus.FAILED
                continue
            self.expected[list(pull.target_blocks)] = pool.memory[list(pull.source_blocks)]
            same = all(
                pool.generations[b] == g for b, g in zip(pull.source_blocks, pull.generations, strict=True)
            )
            assert result.status is (PullStatus.DONE if same else PullStatus.STALE)
        self.reported += len(results)

    @invariant()
    def pool_is_as_expected(self) -> None:
        assert torch.equal(self.pools["reader"].memory, self.expected)
        assert self.reported + len(self.open) == self.started


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def workers(**hooks: object) -> tuple[Pool, Pool, InprocTransport]:
    pools: dict[str, Pool] = {}
    for name in ("source", "reader"):
        transport = InprocTransport(pools, **(hooks if name == "reader" else {}))  # type: ignore[arg-type]
        memory = torch.full((4, 2), float(name == "source"))
        address = transport.register(name, Pool(memory, transport.generations(4)))
        if name == "source":
            source_address = address
    transport.connect(source_address)
    return pools["source"], pools["reader"], transport


def test_fault_fails_a_pull_before_anything_is_written() -> None:
    _, own, reader = workers(fault=lambda pull: "the link is down" if pull.pull_id == 1 else None)
    for pull_id in range(3):
        reader.start(Pull(pull_id, "source", [0], [0], [pull_id]), 1e9)
    results = reader.poll()
    assert [r.status for r in results] == [PullStatus.DONE, PullStatus.FAILED, PullStatus.DONE]
    assert results[1].error == "the link is down"
    assert own.memory[:, 0].tolist() == [1, 0, 1, 0]


def test_fault_may_hand_a_block_out_again_during_the_copy() -> None:
    def raise_generation(_: Pull) -> None:
        source.generations[2] += 1

    source, _, reader = workers(fault=raise_generation)
    reader.start(Pull(0, "source", [2], [0], [0]), 1e9)
    assert reader.poll()[0].status is PullStatus.STALE


def test_pull_from_the_own_pool_reads_before_it_writes() -> None:
    pools: dict[str, Pool] = {}
    transport = InprocTransport(pools)
    memory = torch.arange(4.0).repeat_interleave(2).view(4, 2)
    transport.connect(transport.register("one", Pool(memory, [0] * 4)))
    transport.start(Pull(0, "one", [0, 1, 2], [0] * 3, [1, 2, 3]), 1e9)
    assert transport.poll()[0].status is PullStatus.DONE
    assert memory[:, 0].tolist() == [0, 0, 1, 2]


def test_held_pull_waits_until_its_deadline() -> None:
    now = [0.0]
    _, own, reader = workers(hold=lambda pull: True, clock=lambda: now[0])
    reader.start(Pull(0, "source", [2], [0], [0]), 5.0)
    assert reader.poll() == []
    now[0] = 6.0
    assert reader.poll()[0].status is PullStatus.FAILED
    assert own.memory.sum() == 0


def test_worker_taken_out_of_the_pools_is_gone() -> None:
    pools: dict[str, Pool] = {}
    source, reader = InprocTransport(pools), InprocTransport(pools)
    address = source.register("source", Pool(torch.zeros(4, 2), [0] * 4))
    reader.register("reader", Pool(torch.zeros(4, 2), [0] * 4))
    reader.connect(address)
    reader.start(Pull(0, "source", [2], [0], [0]), 1e9)
    del pools["source"]
    assert reader.poll()[0].error == "source is gone"
    with pytest.raises(
        TransferError, match=r"no worker 'source' shows its pool in this process, only \['reader'\]"
    ):
        reader.connect(address)
