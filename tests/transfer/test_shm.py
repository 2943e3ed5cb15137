"""Shared memory between real processes, whose source may be killed at any moment."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanopd_lab.cpu import block_copy
from nanopd_lab.transfer import segments
from nanopd_lab.transfer.base import Pool, PullStatus, TransferError
from nanopd_lab.transfer.segments import Segment, map_integers, map_tensor
from tests.transfer.workers import Remote, Worker, make_worker, remote_worker, results_of

BLOCKS = 64
SIZE = (8, 2, 3, 16, 64)  # 98 KB a block
linux = pytest.mark.skipif(not segments.ANONYMOUS, reason="anonymous memory by descriptor is Linux's")


@pytest.fixture
def source() -> Iterator[Remote]:
    with remote_worker("shm", "source", BLOCKS, SIZE) as remote:
        yield remote


@pytest.fixture
def reader() -> Iterator[Worker]:
    worker = make_worker("shm", "reader", BLOCKS, size=SIZE, seed=9)
    yield worker
    worker.transport.close()


def start(reader: Worker, pull_id: int, remote: Remote, blocks: list[int], targets: list[int]) -> None:
    stand_in = Worker(remote.name, reader.transport, reader.pool, remote.address)  # all generations are 0
    reader.start(pull_id, stand_in, blocks, targets)


def test_between_processes(source: Remote, reader: Worker) -> None:
    reader.transport.connect(source.address)
    blocks, targets = list(range(0, BLOCKS, 2)), list(range(BLOCKS // 2))
    start(reader, 0, source, blocks, targets)
    assert results_of(reader.transport, 1)[0].status is PullStatus.DONE
    assert torch.equal(reader.bytes[targets], source.expected[blocks])
    source.ask("refill")
    start(reader, 1, source, blocks, targets)
    assert results_of(reader.transport, 1)[1].status is PullStatus.STALE


def test_source_killed_before_anybody_connects(source: Remote, reader: Worker) -> None:
    source.kill()
    with pytest.raises(TransferError, match="closed it or is dead"):
        reader.transport.connect(source.address)


@linux
@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_source_killed(source: Remote, reader: Worker, moment: str) -> None:
    """Whoever is connected reads on: the kernel keeps the memory. Nothing hangs, nothing stays behind."""
    reader.transport.connect(source.address)
    if moment == "before":
        source.kill()
    start(reader, 0, source, list(range(BLOCKS)), list(range(BLOCKS)))
    if moment == "during":
        source.kill()
    result = results_of(reader.transport, 1)[0]
    if moment == "after":
        source.kill()
    assert result.status is PullStatus.DONE
    assert torch.equal(reader.bytes, source.expected)
    name = source.address.details["memory"]["name"]
    assert name in Path("/proc/self/maps").read_text()
    reader.transport.disconnect("source")
    gc.collect()
    assert name not in Path("/proc/self/maps").read_text(), "nobody maps it any more: the kernel has freed it"


@linux
def test_a_descriptor_used_again_is_not_taken_for_the_pool() -> None:
    segment, other = Segment(64), Segment(64)
    details = {**segment.details, "fd": other.details["fd"]}
    with pytest.raises(TransferError, match="something else by now"):
        map_tensor(details)
    segment.close()
    with pytest.raises(TransferError, match=r"No such file|something else by now"):
        map_tensor(segment.details)


@pytest.mark.parametrize("anonymous", [False, pytest.param(True, marks=linux)])
def test_segments(anonymous: bool) -> None:
    segment = Segment(64, anonymous)
    first, second = map_tensor(segment.details), map_integers(segment.details)
    second[3] = -5
    assert first.view(torch.int64).tolist() == [0, 0, 0, -5, 0, 0, 0, 0]
    with pytest.raises(TransferError, match="has 64 bytes, not 128"):
        map_tensor({**segment.details, "num_bytes": 128})
    segment.close()
    segment.close()
    first[0] = 7
    assert second[0] == 7, "mappings outlive the segment"
    with pytest.raises(TransferError, match="cannot be opened"):
        map_tensor(segment.details)


def test_memory_of_others_cannot_be_shown(reader: Worker) -> None:
    pool = Pool(torch.zeros(4, 8), [0] * 4)
    with pytest.raises(TransferError, match="make it with the transport's own `allocate`"):
        reader.transport.register("reader", pool)
    with pytest.raises(TransferError, match="make it with the transport's own `generations`"):
        reader.transport.register("reader", Pool(reader.pool.memory, [0] * BLOCKS))
    with pytest.raises(TransferError, match="'shm' shares CPU memory, not cuda"):
        reader.transport.allocate((4, 8), torch.float32, torch.device("cuda"))


SCRIPT = """
from tests.transfer.workers import make_worker, remote_worker, results_of, Worker
if __name__ == "__main__":
    with remote_worker("shm", "source", 8) as source, remote_worker("shm", "doomed", 8) as doomed:
        reader = make_worker("shm", "reader", 8)
        for remote in (source, doomed):
            reader.transport.connect(remote.address)
        doomed.kill()
        reader.start(0, Worker("doomed", reader.transport, reader.pool, doomed.address), [1], [1])
        print(results_of(reader.transport, 1)[0].status.value)
        source.ask("close")
        {end}
"""


@pytest.mark.parametrize("end", ["reader.transport.close()", "pass", "import os; os._exit(0)"])
def test_no_complaints_and_nothing_left_at_the_end(end: str, tmp_path: Path) -> None:
    """Orderly or not: nothing on stderr (Python's resource tracker would complain there), nothing in /dev/shm."""
    before = shared_files()
    script, root = tmp_path / "script.py", Path(__file__).parents[2]
    script.write_text(SCRIPT.replace("{end}", end))
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    if "_exit" not in end:
        assert run.stdout.split() == ["done"]
    assert shared_files() == before


def shared_files() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.glob("nanopd-*")} if folder.is_dir() else set()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("block_bytes", [16, 100, 4096, 8192 + 64, 3 * 8192 + 4096 + 80])
def test_block_copy(compiled: bool, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and block_copy._library() is None:
        pytest.skip("no C++ compiler here")
    if not compiled:
        monkeypatch.setattr(block_copy, "_library", lambda: None)
    source = torch.randint(256, (9, block_bytes), dtype=torch.uint8)
    target = torch.zeros(9, block_bytes, dtype=torch.uint8)
    block_copy.copy_blocks(source.data_ptr(), [8, 0, 3], target.data_ptr(), [1, 7, 2], block_bytes)
    assert torch.equal(target[[1, 7, 2]], source[[8, 0, 3]])
    assert target[[0, 3, 4, 5, 6, 8]].sum() == 0
