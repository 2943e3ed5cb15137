"""What every transport promises, asked of each of them, with both workers in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from nanopd_lab.transfer.base import Pool, PoolAddress, Pull, PullStatus, TransferError
from tests.transfer.simulated_gpus import SimulatedEvent, SimulatedGpus
from tests.transfer.workers import Worker, make_worker, needs_nixl, results_of

KINDS = [
    pytest.param(("inproc", "cpu"), id="inproc"),
    pytest.param(("shm", "cpu"), id="shm"),
    pytest.param(("torchdist", "cpu"), id="torchdist"),
    pytest.param(("nixl", "cpu"), id="nixl", marks=needs_nixl),
    pytest.param(("shm+torchdist", "cpu"), id="mixed-near"),
    pytest.param(("shm+torchdist", "apart"), id="mixed-far"),
    pytest.param(("p2p", "simulated"), id="p2p-simulated"),
    pytest.param(("pinned", "simulated"), id="pinned-simulated"),
    pytest.param(("inproc", "cuda"), id="inproc-cuda", marks=pytest.mark.gpu),
    pytest.param(("p2p", "cuda"), id="p2p", marks=pytest.mark.gpu),
    pytest.param(("pinned", "cuda"), id="pinned", marks=pytest.mark.gpu),
    pytest.param(("nixl", "cuda"), id="nixl-cuda", marks=[pytest.mark.gpu, needs_nixl]),
]
Make = Callable[..., Worker]


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes workers of one transport that can reach each other; closes them."""
    kind, device = request.param
    if device == "simulated":
        gpus, device = SimulatedGpus(0, monkeypatch), "cpu"
        asked = SimulatedEvent.query
        # Time passes whenever somebody asks.
        monkeypatch.setattr(SimulatedEvent, "query", lambda event: (gpus.run_a_little(), asked(event))[1])
    pools: dict[str, Pool] = {}
    made: list[Worker] = []

    def build(name: str, num_blocks: int = 20, **options: object) -> Worker:
        # With several GPUs, workers are on different ones; with one they share it.
        if device == "apart":
            options["host_identity"] = name
        place = f"cuda:{len(made) % torch.cuda.device_count()}" if device == "cuda" else "cpu"
        made.append(make_worker(kind, name, num_blocks, pools, device=place, **options))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for worker in made:
        worker.transport.close()


@pytest.fixture
def pair(make: Make) -> tuple[Worker, Worker]:
    source, reader = make("source", seed=1), make("reader", seed=2)
    reader.transport.connect(source.address)
    return source, reader


def test_right_bytes_and_no_others(make: Make) -> None:
    source, reader = make("source", 300, seed=1), make("reader", 280, seed=2)
    reader.transport.connect(source.address)
    generator = torch.Generator().manual_seed(0)
    expected, block_bytes = reader.bytes, source.pool.block_bytes
    targets = torch.randperm(280, generator=generator).tolist()
    for pull_id, count in enumerate((1, 2, 40, 7, 150)):
        blocks = torch.randint(300, (count,), generator=generator).tolist()
        mine, targets = targets[:count], targets[count:]
        reader.start(pull_id, source, blocks, mine)
        expected[mine] = source.bytes[blocks]
    results = results_of(reader.transport, 5)
    assert [results[i].status for i in range(5)] == [PullStatus.DONE] * 5, results
    assert [results[i].num_bytes // block_bytes for i in range(5)] == [1, 2, 40, 7, 150]
    assert all(result.started <= result.finished and result.error is None for result in results.values())
    assert torch.equal(reader.bytes, expected)


def test_blocks_larger_than_a_piece(make: Make) -> None:
    """2.4 MB a block, as Qwen3-8B's: several pieces a pull."""
    size = (36, 2, 8, 16, 128)
    source, reader = make("source", 40, size=size, seed=1), make("reader", 40, size=size, seed=2)
    reader.transport.connect(source.address)
    blocks, targets = list(range(40)), [*range(20, 40), *range(20)]
    reader.start(0, source, blocks, targets)
    assert results_of(reader.transport, 1)[0].status is PullStatus.DONE
    assert torch.equal(reader.bytes[targets], source.bytes)


def test_both_ways_at_once(pair: tuple[Worker, Worker]) -> None:
    one, other = pair
    one.transport.connect(other.address)
    first, second = one.bytes, other.bytes
    one.start(0, other, [0, 1, 2], [10, 11, 12])
    other.start(0, one, [0, 1, 2], [10, 11, 12])
    assert results_of(one.transport, 1)[0].status is PullStatus.DONE
    assert results_of(other.transport, 1)[0].status is PullStatus.DONE
    assert torch.equal(one.bytes[10:13], second[:3])
    assert torch.equal(other.bytes[10:13], first[:3])


def test_a_block_used_again_is_noticed(pair: tuple[Worker, Worker]) -> None:
    source, reader = pair
    reader.start(0, source, [3, 4, 5], [0, 1, 2])
    reader.start(1, source, [6], [3])
    source.pool.generations[4] += 1  # before the result is asked for, so the check comes later
    results = results_of(reader.transport, 2)
    assert results[0].status is PullStatus.STALE
    assert results[0].num_bytes == 0
    assert "block 4 of source is of generation 1, not 0" in str(results[0].error)
    assert results[1].status is PullStatus.DONE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "nobody"}, r"not connected to 'nobody', only to \['source'\]"),
        ({"source_blocks": [0, 20]}, "blocks 0 to 20 of source, which has 0 to 19"),
        ({"source_blocks": [-1, 2]}, "blocks -1 to 2 of source"),
        ({"target_blocks": [5, 20]}, "blocks 5 to 20 of reader, which has 0 to 19"),
        ({"target_blocks": [5, 5]}, "writes a target block twice"),
        ({"pull_id": 7}, "pull 7 is under way already"),
    ],
)
def test_senseless_pulls_are_refused(pair: tuple[Worker, Worker], change: dict, message: str) -> None:
    source, reader = pair
    before = reader.bytes
    reader.start(7, source, [1], [1])
    given = {
        "pull_id": 1,
        "source": "source",
        "source_blocks": [0, 1],
        "generations": [0, 0],
        "target_blocks": [2, 3],
    }
    with pytest.raises(TransferError, match=message):
        reader.transport.start(Pull(**{**given, **change}), 1e9)
    assert list(results_of(reader.transport, 1)) == [7]
    assert torch.equal(reader.bytes[2:], before[2:])


def test_addresses_that_do_not_fit_are_refused(pair: tuple[Worker, Worker], make: Make) -> None:
    source, reader = pair
    address = source.address
    other = make("other", size=(5, 8))
    with pytest.raises(TransferError, match=r"other's blocks have 80 bytes, those of reader 1536"):
        reader.transport.connect(other.address)
    wrong = PoolAddress("far", "telepathy", address.num_blocks, address.block_bytes, address.details)
    with pytest.raises(TransferError, match="shown by transport 'telepathy'"):
        reader.transport.connect(wrong)
    assert reader.transport.poll() == []


def test_cancelled(pair: tuple[Worker, Worker]) -> None:
    source, reader = pair
    reader.start(0, source, [0], [0])
    reader.start(1, source, [1], [1])
    reader.transport.cancel(0)
    reader.transport.cancel(99)
    results = results_of(reader.transport, 2)
    assert (results[0].status, results[0].error) == (PullStatus.FAILED, "cancelled")
    assert results[1].status is PullStatus.DONE
    reader.transport.cancel(1)
    assert reader.transport.poll() == []


def test_late(pair: tuple[Worker, Worker]) -> None:
    source, reader = pair
    reader.start(0, source, [0], [0], deadline=0.0)
    result = results_of(reader.transport, 1)[0]
    assert result.status is PullStatus.FAILED
    assert "deadline" in str(result.error)


def test_disconnected_while_under_way(pair: tuple[Worker, Worker]) -> None:
    source, reader = pair
    reader.start(0, source, [0], [0])
    reader.transport.disconnect("source")
    reader.transport.disconnect("nobody")
    result = results_of(reader.transport, 1)[0]
    assert (result.status, result.error) == (PullStatus.FAILED, "source is gone")
    with pytest.raises(TransferError, match="not connected to 'source'"):
        reader.start(1, source, [0], [0])


def test_restarted_source_replaces_the_old_one(pair: tuple[Worker, Worker], make: Make) -> None:
    source, reader = pair
    reader.start(0, source, [0], [0])
    again = make("source", 30, seed=3)
    reader.transport.connect(again.address)
    reader.start(1, again, [25, 0], [1, 2])
    results = results_of(reader.transport, 2)
    assert results[0].status is PullStatus.FAILED
    assert results[1].status is PullStatus.DONE
    assert torch.equal(reader.bytes[[1, 2]], again.bytes[[25, 0]])


def test_closed(pair: tuple[Worker, Worker]) -> None:
    source, reader = pair
    reader.start(0, source, [0], [0])
    reader.transport.close()
    reader.transport.close()
    (result,) = reader.transport.poll()
    assert (result.pull_id, result.status) == (0, PullStatus.FAILED)
    assert "closed" in str(result.error)
    assert reader.transport.poll() == []
    with pytest.raises(TransferError, match="closed; make another"):
        reader.start(1, source, [0], [0])
    assert reader.bytes.shape[0] == 20, "the owner's tensor stays usable"


def test_closed_source_is_a_clear_error(pair: tuple[Worker, Worker], make: Make) -> None:
    source, _ = pair
    source.transport.close()
    with pytest.raises(TransferError, match=r"source|closed"):
        make("late reader").transport.connect(source.address)


def test_pool_must_be_the_transports_own(make: Make) -> None:
    worker = make("reader")
    with pytest.raises(TransferError, match="must be contiguous, with one generation a block"):
        worker.transport.register("reader", Pool(worker.pool.memory.transpose(1, 2), worker.pool.generations))
    with pytest.raises(TransferError, match="19 generations"):
        worker.transport.register("reader", Pool(worker.pool.memory, [0] * 19))


def test_pull_of_nothing_is_refused() -> None:
    with pytest.raises(TransferError, match="1 source blocks, 0 generations, 1 target blocks"):
        Pull(0, "source", [1], [], [1])
