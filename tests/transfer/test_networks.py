"""Three machines, as far as their network goes: namespaces joined by virtual cables, one of which is pulled out.

        near ──── 10.77.1.0/24 ──── one
          └────── 10.77.2.0/24 ──── two

`near` pulls from both others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nanopd_lab.transfer.base import PullResult, PullStatus
from tests.transfer.far_worker import far_worker
from tests.transfer.workers import Remote, needs_nixl

BLOCKS, SIZE = 96, (8, 4, 3, 16, 256)  # 786 KB a block
ALL = list(range(BLOCKS))
FIRST, LAST = ALL[: BLOCKS // 2], ALL[BLOCKS // 2 :]


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Cables:
    """The namespaces' names start with `prefix`."""

    prefix: str

    def space(self, host: str) -> str:
        return f"{self.prefix}-{host}"

    def pull_out(self, number: int) -> None:
        """The cable at the near end; the far end notices too."""
        ip("-n", self.space("near"), "link", "set", f"n{number}", "down")

    def put_back(self, number: int) -> None:
        """Until both ends have noticed."""
        ip("-n", self.space("near"), "link", "set", f"n{number}", "up")
        until = time.monotonic() + 30
        for host, card in (("near", f"n{number}"), (("one", "two")[number - 1], "eth0")):
            while "state UP" not in ip("-n", self.space(host), "link", "show", card):
                assert time.monotonic() < until, f"{card} of {host} does not come up"
                time.sleep(0.01)


@pytest.fixture(scope="module")
def cables() -> Iterator[Cables]:
    if sys.platform != "linux" or not shutil.which("ip"):
        pytest.skip("needs Linux and the command `ip` (Debian: iproute2)")
    made = Cables(f"nanopd{os.getpid()}")
    hosts = ("near", "one", "two")
    try:
        try:
            for host in hosts:
                ip("netns", "add", made.space(host))
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        for host in hosts:
            ip("-n", made.space(host), "link", "set", "lo", "up")
        for number, host in ((1, "one"), (2, "two")):
            # Made inside: a name outside could be taken.
            ip("-n", made.space("near"), "link", "add", f"n{number}", "type", "veth",
               "peer", "name", "eth0", "netns", made.space(host))  # fmt: skip
            for space, card, last in ((made.space("near"), f"n{number}", 1), (made.space(host), "eth0", 2)):
                ip("-n", space, "address", "add", f"10.77.{number}.{last}/24", "dev", card)
                ip("-n", space, "link", "set", card, "up")
        yield made
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", made.space(host)], capture_output=True)


@dataclass
class Three:
    near: Remote
    cables: Cables

    def pull(self, pull_id: int, source: str, seconds: float = 30.0, blocks: list[int] = ALL) -> None:
        self.near.ask("pull", pull_id, source, blocks, blocks, seconds)

    def results(self, count: int) -> dict[int, PullResult]:
        return self.near.ask("results", count)

    def holds(self, seed: int) -> bool:
        return self.near.ask("holds", ALL, seed, ALL)


@pytest.fixture(scope="module", params=["torchdist", pytest.param("nixl", marks=needs_nixl)])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def three(cables: Cables, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    folder = tmp_path_factory.mktemp("pipes")
    with ExitStack() as stack:
        places = (("near", "10.77.1.1", 9), ("one", "10.77.1.2", 1), ("two", "10.77.2.2", 2))
        started = [
            stack.enter_context(
                far_worker(cables.space(host), f"{kind}:{at}", host, BLOCKS, SIZE, seed, folder)
            )
            for host, at, seed in places
        ]
        near, *far = (ready() for ready in started)
        for each in far:  # on another machine the table of generations cannot be mapped
            details = {key: value for key, value in each.address.details.items() if key != "generations"}
            assert near.ask("connect", replace(each.address, details=details)) is None
        yield Three(near, cables)
        for each in (near, *far):
            each.ask("close")
            assert each.process.returncode == 0


def test_right_bytes(three: Three) -> None:
    for seed, source in ((1, "one"), (2, "two")):
        three.pull(seed, source)
        assert three.results(1)[seed].status is PullStatus.DONE
        assert three.holds(seed)


def test_a_cable_pulled_out_fails_its_pulls_in_time_and_no_others(three: Three) -> None:
    """A pull that has not ended may write its blocks: the other side's beside it goes elsewhere, that behind it not."""
    for pull_id in range(10):  # 38 MB each
        three.pull(pull_id, "one", seconds=2.0, blocks=FIRST)
    three.cables.pull_out(1)
    try:
        for pull_id in range(10, 20):  # behind those under way, if any are: a busy machine may have been late
            three.pull(pull_id, "one", seconds=2.0, blocks=FIRST)
        three.pull(20, "two", blocks=LAST)
        ended = three.results(21)
        three.pull(21, "two", blocks=FIRST)
        assert three.results(1)[21].status is PullStatus.DONE
    finally:
        three.cables.put_back(1)
    assert ended[20].status is PullStatus.DONE
    assert ended[19].status is PullStatus.FAILED
    assert three.holds(2), "what came late from the other has been written over it"


def test_and_is_reached_again_when_it_is_back(three: Three) -> None:
    three.pull(30, "one")
    assert three.results(1)[30].status is PullStatus.DONE
    assert three.holds(1)


def test_nothing_stays_behind(three: Three) -> None:
    """Whatever the cable did: the threads and files of the near side are those of two links."""
    three.pull(40, "two")
    three.results(1)
    proc = Path("/proc", str(three.near.process.pid))
    before = [len(list((proc / kind).iterdir())) for kind in ("fd", "task")]
    for pull_id in range(41, 44):
        three.pull(pull_id, "one", seconds=0.3)
        three.cables.pull_out(1)
        three.results(1)
        three.cables.put_back(1)
        three.pull(pull_id + 100, "one")
        assert three.results(1)[pull_id + 100].status is PullStatus.DONE
    after = [len(list((proc / kind).iterdir())) for kind in ("fd", "task")]
    assert all(now <= then + 2 for then, now in zip(before, after, strict=True)), (before, after)
