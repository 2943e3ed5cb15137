"""Workers as actors of a Ray of our own, which all tests here share; see `launched`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.launched import LauncherSuite

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
