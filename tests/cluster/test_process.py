"""Workers as processes of this machine; see `launched`."""

from __future__ import annotations

from tests.cluster.launched import LauncherSuite


class TestProcesses(LauncherSuite):
    launcher = "process"
    killed = "died with exit code -9"
