"""Workers as processes of this machine; see `launched`."""

from __future__ import annotations

import os
import signal

from nanopd_lab import LLM
from tests.cluster.launched import GREEDY, LauncherSuite, alone, prompts


class TestProcesses(LauncherSuite):
    launcher = "process"
    killed = "died with exit code -9"

    def test_ctrl_c_is_for_the_one_that_started_them(self, llm: LLM) -> None:
        """A terminal sends it to all processes; a server's requests still have some seconds to end."""
        with self.start("1p1d", max_restarts=0) as cluster:
            before = [cluster.launcher.pid(name) for name in ("w0", "w1")]  # type: ignore[union-attr]
            for pid in before:
                assert pid is not None
                os.kill(pid, signal.SIGINT)
            batch = prompts([40, 7], seed=5)
            outputs = cluster.generate(batch, GREEDY, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == alone(llm, batch, GREEDY)
            assert before == [cluster.launcher.pid(name) for name in ("w0", "w1")]  # type: ignore[union-attr]
