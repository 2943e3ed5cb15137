"""Workers as actors of a Ray of our own, which all tests here share; see `launched`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nanopd_lab import LLM, Cluster
from nanopd_lab.cluster import janitor
from nanopd_lab.cluster.ray_options import RayOptions
from nanopd_lab.cluster.ray_session import RaySession
from tests.cluster.launched import GREEDY, LauncherSuite, alone
from tests.engine.test_token_identity import prompts

pytest.importorskip("ray", reason="launcher 'ray' needs the extra dist")


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[RaySession]:
    """Kept open between the clusters."""
    session = RaySession.acquire(RayOptions())
    yield session
    session.release()


def listening(process: int) -> set[str]:
    """Addresses at which a process waits for connections, in the kernel's notation."""
    sockets = set()
    for file in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):
            sockets.add(str(file.readlink()))
    lines = [
        line.split()
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]
    ]
    return {
        words[1].partition(":")[0]
        for words in lines
        if words[3] == "0A" and f"socket:[{words[9]}]" in sockets
    }


class TestRay(LauncherSuite):
    launcher = "ray"
    killed = ""

    def test_a_second_cluster_shares_ray(self, pair: Cluster, llm: LLM) -> None:
        batch = prompts([20, 60], seed=4)
        with self.start("collocated", 1) as second:
            for cluster in (second, pair):
                outputs = cluster.generate(batch, GREEDY, use_tqdm=False)
                assert [output.outputs[0].token_ids for output in outputs] == alone(llm, batch, GREEDY)
        assert pair.generate(batch, GREEDY, use_tqdm=False)[0].finished

    def test_nothing_can_be_reached_from_elsewhere(self, session: RaySession, pair: Cluster) -> None:
        loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
        processes = janitor.users_of(str(session.folder))
        assert len(processes) > 3
        found = {address for process in (*processes, os.getpid()) for address in listening(process)}
        assert found
        assert found <= loopback
