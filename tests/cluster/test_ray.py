"""Workers as actors of a Ray of our own, which all tests here share; see `launched`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nanopd_lab import LLM, Cluster
from tests.cluster.launched import GREEDY, LauncherSuite, alone
from tests.engine.test_token_identity import prompts

pytest.importorskip("ray", reason="launcher 'ray' needs the extra dist")


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[object]:
    """Kept open between the clusters."""
    from nanopd_lab.cluster.ray_options import RayOptions
    from nanopd_lab.cluster.ray_session import RaySession

    session = RaySession.acquire(RayOptions())
    yield session
    session.release()


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
