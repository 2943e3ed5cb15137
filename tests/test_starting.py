"""Workers' processes begin with everything imported, in the environment of now."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from nanopd_lab.starting import process_context, take_environment


def report(connection: Connection, environment: Mapping[str, str]) -> None:
    imported = {"torch", "transformers.models.llama.modeling_llama", "nanopd_lab.cluster.build"} & set(
        sys.modules
    )
    take_environment(environment)
    connection.send((len(imported), dict(os.environ), str(Path.cwd())))


def started() -> tuple[int, dict[str, str], str]:
    context = process_context(["cpu", "cpu"])
    ours, theirs = context.Pipe()
    process = context.Process(target=report, args=(theirs, dict(os.environ)))
    process.start()
    assert ours.poll(120)
    found = ours.recv()
    process.join()
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every worker starts afresh")
def test_on_a_cpu_imports_are_done_and_the_environment_is_that_of_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANOPD_LAB_TEST", "first")
    imported, environment, folder = started()
    assert (imported, environment, folder) == (3, dict(os.environ), str(Path.cwd()))
    monkeypatch.delenv("NANOPD_LAB_TEST")
    monkeypatch.setenv("NANOPD_LAB_OTHER", "second")
    _, environment, _ = started()
    assert environment == dict(os.environ)


def test_a_gpu_gets_fresh_processes() -> None:
    """A fork after somebody has looked at the device could not use it."""
    context = process_context(["cpu", "cuda:0"])
    assert context.get_start_method() == "spawn"
