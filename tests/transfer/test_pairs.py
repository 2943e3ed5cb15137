"""The transports over a network between real processes, whose source may be killed or stopped at any moment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from nanopd_lab.transfer.base import Pool, PullStatus, TransferError
from nanopd_lab.transfer.pull_service import PullService, line_of
from nanopd_lab.transfer.registry import create_transport
from nanopd_lab.transfer.staging import CHUNK_BYTES, DIRECT_BYTES
from tests.transfer.workers import Remote, Worker, make_worker, needs_nixl, remote_worker, results_of, soon

BLOCKS = 128
SIZE = (8, 4, 3, 16, 256)  # 786 KB a block: a pull of all is several chunks
ALL = list(range(BLOCKS))
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into Linux's /proc")


@pytest.fixture(params=["torchdist", pytest.param("nixl", marks=needs_nixl)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def source(kind: str) -> Iterator[Remote]:
    with remote_worker(kind, "source", BLOCKS, SIZE) as remote:
        yield remote


@pytest.fixture
def reader(kind: str) -> Iterator[Worker]:
    worker = make_worker(kind, "reader", BLOCKS, size=SIZE, seed=9)
    yield worker
    worker.transport.close()


def start(
    reader: Worker, pull_id: int, remote: Remote, blocks: list[int], deadline: float | None = None
) -> None:
    stand_in = Worker(remote.name, reader.transport, reader.pool, remote.address)  # all generations are 0
    reader.start(pull_id, stand_in, blocks, blocks, deadline=soon() if deadline is None else deadline)


def elsewhere(remote: Remote) -> Remote:
    """As a reader on another machine sees it, who cannot map the generation table."""
    details = {key: value for key, value in remote.address.details.items() if key != "generations"}
    return replace(remote, address=replace(remote.address, details=details))


@pytest.mark.parametrize("far", [False, True])
def test_between_processes(source: Remote, reader: Worker, far: bool) -> None:
    assert reader.pool.block_bytes > DIRECT_BYTES
    assert reader.pool.block_bytes * BLOCKS > 4 * CHUNK_BYTES["cpu"]
    remote = elsewhere(source) if far else source
    reader.transport.connect(remote.address)
    start(reader, 0, remote, ALL)
    assert results_of(reader.transport, 1)[0].status is PullStatus.DONE
    assert torch.equal(reader.bytes, source.expected)
    source.ask("refill")
    start(reader, 1, remote, ALL)
    result = results_of(reader.transport, 1)[1]
    assert result.status is PullStatus.STALE
    assert "is of generation 1, not 0: used again" in str(result.error)


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_killed_source_fails_its_pulls_and_no_others(
    kind: str, source: Remote, reader: Worker, moment: str
) -> None:
    with remote_worker(kind, "other", BLOCKS, SIZE, seed=5) as other:
        reader.transport.connect(source.address)
        reader.transport.connect(other.address)
        if moment == "before":
            source.kill()
        for pull_id in range(3):
            start(reader, pull_id, source, ALL)
        if moment == "during":
            source.kill()
        ended = results_of(reader.transport, 3)
        for result in ended.values():
            if moment == "before" or result.status is not PullStatus.DONE:
                assert result.status is PullStatus.FAILED
                assert "source did not send" in str(result.error)
        start(reader, 3, other, ALL)
        assert results_of(reader.transport, 1)[3].status is PullStatus.DONE
        assert torch.equal(reader.bytes, other.expected)


def test_a_killed_reader_leaves_the_source_to_others(kind: str, source: Remote, reader: Worker) -> None:
    with remote_worker(kind, "doomed", BLOCKS, SIZE) as doomed:
        doomed.ask("connect", source.address)
        doomed.ask("pull", 0, "source", ALL, ALL)
        doomed.kill()
    reader.transport.connect(source.address)
    start(reader, 0, source, ALL)
    assert results_of(reader.transport, 1)[0].status is PullStatus.DONE


def test_a_source_that_hangs_makes_its_pulls_late_and_is_reached_again(
    source: Remote, reader: Worker
) -> None:
    reader.transport.connect(source.address)
    start(reader, 0, source, [0])
    assert results_of(reader.transport, 1)[0].status is PullStatus.DONE
    os.kill(source.process.pid, signal.SIGSTOP)
    try:
        start(reader, 1, source, ALL, deadline=time.monotonic() + 0.5)
        start(reader, 2, source, ALL, deadline=time.monotonic() + 0.5)
        ended = results_of(reader.transport, 2)
        before = reader.bytes
    finally:
        os.kill(source.process.pid, signal.SIGCONT)
    assert {result.status for result in ended.values()} == {PullStatus.FAILED}
    assert source.ask("results", 0) == {}  # it is there again, and has had what was asked of it
    assert torch.equal(reader.bytes, before), "what comes late is written nowhere"
    start(reader, 3, source, ALL)
    assert results_of(reader.transport, 1)[3].status is PullStatus.DONE
    assert torch.equal(reader.bytes, source.expected)


def test_closing_waits_for_no_source_that_hangs(source: Remote, reader: Worker) -> None:
    reader.transport.connect(source.address)
    start(reader, 0, source, [0])
    results_of(reader.transport, 1)
    os.kill(source.process.pid, signal.SIGSTOP)
    try:
        start(reader, 1, source, ALL)
        time.sleep(0.1)  # it waits for the first chunk
        reader.transport.close()
        assert [name for name in names_of_threads() if name.endswith("-source")] == []
    finally:
        os.kill(source.process.pid, signal.SIGCONT)
    (result,) = reader.transport.poll()
    assert result.status is PullStatus.FAILED


def names_of_threads() -> list[str]:
    return [
        thread.name
        for thread in threading.enumerate()
        if thread.name.startswith(("nanopd-torchdist", "nanopd-nixl"))
    ]


@linux
def test_nothing_stays_behind(kind: str) -> None:
    before = set(names_of_threads())

    def once() -> None:
        workers = [make_worker(kind, name, 8, seed=2) for name in ("one", "two")]
        one, two = workers
        one.transport.connect(two.address)
        two.transport.connect(one.address)
        one.start(0, two, [1, 2], [3, 4])
        assert results_of(one.transport, 1)[0].status is PullStatus.DONE
        one.transport.disconnect("two")
        for worker in workers:
            worker.transport.close()
        assert set(names_of_threads()) <= before

    once()
    first = held()
    for _ in range(5):
        once()
    assert all(after <= before + 2 for before, after in zip(first, held(), strict=True))


class Silent:
    """Answers nothing, until the reader has gone."""

    def answer(
        self, connection: socket.socket, lines: BinaryIO, abort_by: Callable[[Callable[[], None]], None]
    ) -> None:
        lines.readline()


def test_a_closed_service_has_waited_for_whoever_was_about_to_end() -> None:
    """Readers that go just before: a few of a thousand of their threads are between their last step and their end."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(300):
            service = PullService("127.0.0.1", Silent(), "ending")
            place = service.details["host"], service.details["port"]
            readers = [socket.create_connection(place) for _ in range(3)]
            for reader in readers:
                reader.sendall(json.dumps({"token": service.details["token"]}).encode() + b"\n")
            time.sleep(0.002)
            for reader in readers:
                reader.close()
            service.close()
            assert [
                each.name for each in threading.enumerate() if each.name.startswith("nanopd-ending")
            ] == []
    finally:
        sys.setswitchinterval(before)


def held() -> list[int]:
    """Open files and threads, those of C++ as well."""
    return [len(list(Path("/proc/self", kind).iterdir())) for kind in ("fd", "task")]


SCRIPT = """
from tests.transfer.workers import make_worker, remote_worker, results_of, Worker
if __name__ == "__main__":
    with remote_worker("{kind}", "source", 8) as source, remote_worker("{kind}", "doomed", 8) as doomed:
        reader = make_worker("{kind}", "reader", 8)
        for remote in (source, doomed):
            reader.transport.connect(remote.address)
        source.ask("connect", reader.address)
        for number, remote in enumerate((source, doomed)):
            reader.start(number, Worker(remote.name, reader.transport, reader.pool, remote.address), [1], [number])
        print(*(result.status.value for result in results_of(reader.transport, 2).values()))
        doomed.kill()
        {end}
"""


@pytest.mark.parametrize("kind", ["torchdist", pytest.param("nixl", marks=needs_nixl)])
@pytest.mark.parametrize("end", ["source.ask('close'); reader.transport.close()", "pass", "del reader"])
def test_no_complaints_at_the_end(kind: str, end: str, tmp_path: Path) -> None:
    """Orderly or not. C++ aborts a process whose threads outlive what they belong to."""
    script, root = tmp_path / "script.py", Path(__file__).parents[2]
    script.write_text(SCRIPT.replace("{end}", end).replace("{kind}", kind))
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120,
    )  # fmt: skip
    assert (run.returncode, run.stderr, run.stdout) == (0, "", "done done\n")


def test_small_blocks(kind: str) -> None:
    one, two = (make_worker(kind, name, 3000, seed=seed) for name, seed in (("one", 3), ("two", 4)))
    assert 3000 * one.pool.block_bytes < CHUNK_BYTES["cpu"]
    two.transport.connect(one.address)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0)).tolist()
    two.start(0, one, order, list(range(3000)))
    assert results_of(two.transport, 1)[0].status is PullStatus.DONE
    assert torch.equal(two.bytes, one.bytes[order])
    for worker in (one, two):
        worker.transport.close()


def test_cancelling_ends_a_pull_and_leaves_the_channel_usable(source: Remote, reader: Worker) -> None:
    reader.transport.connect(source.address)
    os.kill(source.process.pid, signal.SIGSTOP)  # none may have ended before it is cancelled
    try:
        for pull_id in range(6):
            start(reader, pull_id, source, ALL)
        for pull_id in (0, 2, 3):
            reader.transport.cancel(pull_id)
    finally:
        os.kill(source.process.pid, signal.SIGCONT)
    ended = results_of(reader.transport, 6)
    assert [ended[i].status is PullStatus.DONE for i in range(6)] == [False, True, False, False, True, True]
    assert torch.equal(reader.bytes, source.expected)


@linux
def test_it_listens_on_loopback_unless_told_otherwise(source: Remote, reader: Worker) -> None:
    reader.transport.connect(source.address)
    start(reader, 0, source, [1])
    results_of(reader.transport, 1)
    for process in ("self", str(source.process.pid)):
        own = {str(path.readlink()) for path in Path("/proc", process, "fd").iterdir() if path.is_symlink()}
        rows = [
            line.split()
            for kind in ("tcp", "tcp6")
            for line in Path("/proc/net", kind).read_text().splitlines()[1:]
        ]
        listening = [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
        assert len(listening) >= 2, "for readers, for their store"
        assert set(listening) == {"0100007F"}


def test_an_address_that_is_not_ours_is_named(kind: str) -> None:
    transport = create_transport(f"{kind}:192.0.2.1")  # of the range for documentation
    pool = Pool(torch.zeros(4, 8), transport.generations(4))
    with pytest.raises(
        TransferError, match=r"cannot listen on '192\.0\.2\.1'.*give an address of this machine"
    ):
        transport.register("reader", pool)
    transport.close()


def test_strangers_get_nothing(source: Remote, reader: Worker) -> None:
    """Somebody who has the port and not the token; a source that has somebody else's port."""
    where = source.address.details["host"], source.address.details["port"]
    for sent in (line_of({"token": "guess"}), b"GET / HTTP/1.1\r\n\r\n", b""):
        with socket.create_connection(where, timeout=10) as stranger:
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(100) == b""
    wrong = {**source.address.details, "token": "of one who was here before"}
    with pytest.raises(TransferError, match=r"source does not answer at 127\.0\.0\.1"):
        reader.transport.connect(replace(source.address, details=wrong))
    reader.transport.connect(source.address)
    start(reader, 0, source, [5])
    assert results_of(reader.transport, 1)[0].status is PullStatus.DONE
