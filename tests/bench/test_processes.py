"""Ctrl-C, which a terminal sends to every process, ends studies in several processes with one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from nanopd_lab.bench.processes import process_pool


@pytest.mark.timeout(120)
def test_what_processes_are_at_is_given_up_when_it_fails() -> None:
    waiting: list[Future[None]] = []

    def fail() -> None:
        with process_pool(2) as pool:
            waiting.extend(pool.submit(time.sleep, 1000) for _ in range(3))
            raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        fail()
    assert all(future.done() for future in waiting)


@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("ps") is None, reason="no ps of Linux")
@pytest.mark.parametrize("computing", [False, True])
@pytest.mark.parametrize(
    "command",
    [
        ["regret", "--seeds", "9"],
        [
            "simulate-fleet",
            "--workers",
            "400",
            "--seconds",
            "600",
            "--seeds",
            "4",
            "--policies",
            "least-loaded",
        ],
    ],
)
def test_an_interrupted_study_says_so_and_leaves_nobody(
    command: list[str], computing: bool, tmp_path: Path
) -> None:
    """All processes get the signal, as the children begin or while they compute."""
    path, log = tmp_path / "result.json", tmp_path / "log"
    words = [sys.executable, "-m", "nanopd_lab.cli", *command, "--jobs", "2", "--result-filename", str(path)]
    with log.open("w") as out:
        study = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while len(_children(study.pid)) < 2:
            assert study.poll() is None, log.read_text()
            time.sleep(0.02)
        if computing:  # importing takes one or two seconds
            time.sleep(5)
        os.killpg(study.pid, signal.SIGINT)
        code = study.wait(60)
    finally:
        if study.poll() is None:
            os.killpg(study.pid, signal.SIGKILL)
            study.wait()
    told = log.read_text()
    assert code == 130, told
    assert "Traceback" not in told
    assert told.rstrip().endswith("nanopd-lab: interrupted")
    assert _left(study.pid) == []


def _children(pid: int) -> list[int]:
    """Processes that compute: all but the one that keeps count of shared memory."""
    lines = _ps("-o", "pid=,command=", "--ppid", str(pid))
    return [int(line.split()[0]) for line in lines if "resource_tracker" not in line]


def _left(session: int) -> list[str]:
    """Who is there of a session a moment later; on a busy machine a minute."""
    for _ in range(1200):
        if not (found := _ps("-o", "pid=,command=", "--sid", str(session))):
            break
        time.sleep(0.05)
    return found


def _ps(*words: str) -> list[str]:
    return subprocess.run(["ps", *words], capture_output=True, text=True).stdout.splitlines()
