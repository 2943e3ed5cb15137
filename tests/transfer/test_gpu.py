"""Pools of GPUs between real processes; what only one GPU can show, and two if they are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from nanopd_lab.transfer.base import Pool, PoolAddress, PullStatus, TransferError
from tests.transfer.workers import Remote, make_worker, needs_nixl, remote_worker, results_of

pytestmark = pytest.mark.gpu
BLOCKS = 64
SIZE = (36, 2, 8, 16, 128)  # a block of Qwen3-8B, 2.4 MB


@pytest.fixture(params=["p2p", "pinned", pytest.param("nixl", marks=needs_nixl)])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Remote, Remote]]:
    """A source and a reader, both in processes of their own: a context that breaks is not that of the tests."""
    with ExitStack() as stack:
        yield tuple(  # type: ignore[misc]
            stack.enter_context(
                remote_worker(
                    request.param, name, BLOCKS, SIZE, f"cuda:{index % torch.cuda.device_count()}", index
                )
            )
            for index, name in enumerate(("source", "reader"))
        )


def test_between_processes(pair: tuple[Remote, Remote]) -> None:
    source, reader = pair
    assert reader.ask("connect", source.address) is None
    blocks, targets = list(range(0, BLOCKS, 2)), list(range(BLOCKS // 2))
    reader.ask("pull", 0, "source", blocks, targets)
    assert reader.ask("results", 1)[0].status is PullStatus.DONE
    assert reader.ask("holds", targets, 0, blocks)
    source.ask("refill")
    reader.ask("pull", 1, "source", blocks, targets)
    assert reader.ask("results", 1)[1].status is PullStatus.STALE
    reader.ask("disconnect", "source")
    source.ask("close")
    reader.ask("close")
    assert (source.process.exitcode, reader.process.exitcode) == (0, 0)


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_source_killed(pair: tuple[Remote, Remote], moment: str) -> None:
    """Right bytes or a failed pull, never a hang, and the reader serves on."""
    source, reader = pair
    assert reader.ask("connect", source.address) is None
    everything = list(range(BLOCKS))
    if moment == "before":
        source.kill()
    reader.ask("pull", 0, "source", everything, everything)
    if moment == "during":
        source.kill()
    result = reader.ask("results", 1)[0]
    if moment == "after":
        source.kill()
    if result.status is PullStatus.DONE:
        assert reader.ask("holds", everything, 0, everything)
    else:
        assert result.status is PullStatus.FAILED
    reader.ask("disconnect", "source")
    with remote_worker(source.address.transport, "source", BLOCKS, SIZE, "cuda:0", 7) as again:
        assert reader.ask("connect", again.address) is None
        reader.ask("pull", 1, "source", everything, everything[::-1])
        assert reader.ask("results", 1)[1].status is PullStatus.DONE
        assert reader.ask("holds", everything[::-1], 7, everything)
        reader.ask("disconnect", "source")


def test_source_killed_before_anybody_connects(pair: tuple[Remote, Remote]) -> None:
    source, reader = pair
    source.kill()
    assert "is dead" in str(reader.ask("connect", source.address))


@pytest.mark.parametrize("kind", ["p2p", "pinned"])
def test_pull_waits_for_what_was_launched_before(kind: str) -> None:
    """Kernels of a target block's last owner that are still to run must not write over what arrives."""
    source, reader = (
        make_worker(kind, name, 32, size=SIZE, device="cuda", seed=i) for i, name in enumerate("sr")
    )
    reader.transport.connect(source.address)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = (busy @ busy).clamp(-1, 1)
    reader.pool.memory.zero_()
    reader.start(0, source, list(range(32)), list(range(32)))
    assert results_of(reader.transport, 1)[0].status is PullStatus.DONE
    assert torch.equal(reader.bytes, source.bytes)
    for worker in (reader, source):
        worker.transport.close()


def test_pinned_feeds_long_pulls_from_poll() -> None:
    """More blocks than are enqueued at once, several pulls in the ring together, one of them cancelled."""
    from nanopd_lab.transfer.pinned import MAX_AHEAD

    count = 5 * MAX_AHEAD
    source = make_worker("pinned", "source", count, size=(64, 128), device="cuda", seed=1)
    reader = make_worker("pinned", "reader", 2 * count, size=(64, 128), device="cuda", seed=2)
    reader.transport.connect(source.address)
    order = torch.randperm(count).tolist()
    reader.start(0, source, list(range(count)), order)
    reader.start(1, source, order, list(range(count, 2 * count)))
    reader.start(2, source, order[:10], order[:10])
    reader.transport.cancel(2)
    results = results_of(reader.transport, 3)
    assert [results[i].status for i in range(3)] == [PullStatus.DONE, PullStatus.DONE, PullStatus.FAILED]
    assert torch.equal(reader.bytes[count:], source.bytes[order])
    reader.transport.close()
    source.transport.close()


def test_only_memory_of_gpus() -> None:
    for kind in ("p2p", "pinned"):
        worker = make_worker(kind, "reader", 4, device="cuda")
        with pytest.raises(TransferError, match="use 'shm' for CPUs"):
            worker.transport.allocate((4, 8), torch.float32, torch.device("cpu"))
        with pytest.raises(TransferError, match="make it with the transport's own `generations`"):
            worker.transport.register("reader", Pool(worker.pool.memory, [0] * 4))
        details = {**worker.address.details, "memory": {**worker.address.details["memory"], "gpu": "another"}}
        elsewhere = PoolAddress("far", kind, 4, worker.address.block_bytes, details)
        with pytest.raises(TransferError, match=r"the source's GPU \(another\) is not visible"):
            worker.transport.connect(elsewhere)
        worker.transport.close()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_pull_kernel_between_two_gpus() -> None:
    from nanopd_lab.kernels import ops
    from nanopd_lab.transfer.device_memory import can_reach, enable_peer_access

    here, there = torch.device("cuda:0"), torch.device("cuda:1")
    if not can_reach(here, there):
        pytest.skip("these GPUs have no peer access")
    enable_peer_access(here, there)
    source = torch.randn(20, 64, 128, device=there)
    target = torch.zeros(10, 64, 128, device=here)
    torch.cuda.synchronize(there)
    to_ids, from_ids = torch.tensor([3, 0, 9], device=here), torch.tensor([19, 4, 5], device=here)
    ops.pull_blocks(target, to_ids, source, from_ids)
    assert torch.equal(target[to_ids].cpu(), source.cpu()[[19, 4, 5]])
