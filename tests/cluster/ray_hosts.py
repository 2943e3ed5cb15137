"""Hosts on one machine, for a Ray cluster over them: each with its own network, processes, shared memory and clock.

They are made of the kernel's namespaces and joined by a bridge, so that a host can be killed whole, its cable pulled,
and its `time.monotonic()` be another's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nanopd_lab.cluster import janitor

HEAD_ONLY = ("--include-dashboard=false", "--no-monitor")
AHEAD_S = 1000  # of the first host's clock, twice that of the second's


def why_not() -> str | None:
    """What keeps hosts from being made here, if anything does."""
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]:
        return f"needs the program {missing[0]}"
    name = f"npdt{os.getpid()}"[:15]
    for command in (
        ["unshare", "--net", "--ipc", "--mount", "--pid", "--time", "--monotonic", "1", "--fork", "true"],
        ["ip", "link", "add", name, "type", "bridge"],
        ["ip", "link", "del", name],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command[:3])} is not permitted here: {done.stderr.strip()}"
    return None


@dataclass
class Hosts:
    """The head is this machine itself; `others` are those that can be cut off and killed."""

    network: str
    folder: Path
    cpus: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    others: dict[str, tuple[str, subprocess.Popen[bytes]]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return f"{self.network}.1"

    @property
    def address(self) -> str:
        return f"{self.head}:6399"

    def start_head(self, bridge: str) -> None:
        run("ip", "link", "add", bridge, "type", "bridge")
        own = f"{bridge}h"  # UCX leaves bridges alone
        run("ip", "link", "add", own, "type", "veth", "peer", "name", f"{bridge}v1")
        run("ip", "link", "set", f"{bridge}v1", "master", bridge, "up")
        run("ip", "addr", "add", f"{self.head}/24", "dev", own)
        run("ip", "link", "set", own, "up")
        run("ip", "link", "set", bridge, "up")
        for _ in range(5):
            if self._joins(self.head, self._ray([], self.head, "--head", "--port=6399", *HEAD_ONLY)):
                return
            janitor.clear(str(self.folder / "1"), 0.0)
        raise TimeoutError("Ray's head does not come up")

    def start_other(self, bridge: str, number: int) -> None:
        link, address = f"{bridge}v{number}", f"{self.network}.{number}"
        apart = ["unshare", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc", "--time"]
        # Where Ray has given up all that it began is killed: of this host only, which sees no other processes.
        inside = (
            "mount -t tmpfs tmpfs /dev/shm; mount -t sysfs sysfs /sys; read up; "
            "ip link set lo up; ip link set eth0 up; "
            f'ip addr add {address}/24 dev eth0; until "$0" "$@"; do [ $$ = 1 ] && kill -9 -1; done'
        )
        clock = ["--monotonic", str((number - 1) * AHEAD_S)]
        process = self._ray([*apart, *clock, "sh", "-c", inside], address, f"--address={self.address}")
        self.others[address] = link, process
        assert process.stdin is not None
        # `unshare` itself stays in the network of its children.
        while Path(f"/proc/{process.pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
            assert process.poll() is None
            time.sleep(0.01)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        run("ip", "link", "set", link, "master", bridge, "up")
        process.stdin.write(b"up\n")
        process.stdin.flush()
        assert self._joins(address, process)  # before the next: all at once are slower than Ray lets them be

    def _joins(self, address: str, process: subprocess.Popen[bytes]) -> bool:
        """Until it has; False if it gave up. Ray's own limits, 15 s for an agent to begin and 30 s for a node, are not
        to be set (ray-project/ray#65983), and a busy machine takes longer: who misses them begins again."""
        deadline = time.monotonic() + 300
        said = self.folder / address.rpartition(".")[2] / "said"
        while "will now block forever" not in said.read_text():
            if process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"{address} does not join: {said.read_text()[-2000:]}")
            time.sleep(0.1)
        return True

    def _ray(self, before: list[str], address: str, *words: str) -> subprocess.Popen[bytes]:
        folder = self.folder / address.rpartition(".")[2]
        folder.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            # Who does not answer for 20 s is dead: a host that is busy takes seconds at times.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "20",
        }
        process = subprocess.Popen(
            [
                *before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words,
                f"--node-ip-address={address}", f"--temp-dir={folder}", f"--num-cpus={self.cpus}",
                "--object-store-memory=80000000", "--disable-usage-stats", "--include-log-monitor=false",
            ],
            stdin=subprocess.PIPE,
            stdout=(folder / "said").open("wb"),
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def pull_cable(self, address: str) -> None:
        run("ip", "link", "set", self.others[address][0], "down")

    def plug_cable(self, address: str) -> None:
        run("ip", "link", "set", self.others[address][0], "up")

    def kill(self, address: str) -> None:
        """kill -9 of every process there, at once."""
        self.others[address][1].kill()

    def stop(self, bridge: str) -> None:
        for process in self.started:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()
        janitor.clear(str(self.folder), 0.0)
        # A host's network outlives its processes for as long as it has something to send.
        for link in (*(each for each, _ in self.others.values()), f"{bridge}h", bridge):
            subprocess.run(["ip", "link", "del", link], capture_output=True)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def hosts(others: int, cpus: int) -> Iterator[Hosts]:
    """A Ray cluster over this machine and `others` beside it."""
    number = os.getpid()
    bridge = f"npd{number % 1_000_000}"
    made = Hosts(f"10.{64 + number % 64}.{number // 64 % 256}", Path(tempfile.mkdtemp(prefix="npd-")), cpus)
    try:
        made.start_head(bridge)
        for each in range(others):
            made.start_other(bridge, each + 2)
        yield made
    finally:
        made.stop(bridge)
