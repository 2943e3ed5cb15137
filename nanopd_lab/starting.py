"""How a worker's process begins.

torch and transformers take seconds of computing to import. On a CPU all workers are forked from one process that
has imported them once, so the second worker, the second cluster and a restart cost none of it. Where a GPU is
used each process starts afresh: a device must not have been touched before a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext


def process_context(devices: Iterable[str]) -> ForkServerContext | SpawnContext:
    """Where workers on these devices come from. A process that they are forked from begins to import at once.

    It ends with this process, and is shared by everything here that forks from a server.
    """
    if sys.platform != "linux" or any(device != "cpu" for device in devices):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanopd_lab.cluster.preload"])
    with uninterrupted():
        forkserver.ensure_running()
    return context


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Processes begun meanwhile never see Ctrl-C, which a terminal sends to all of them: the one that began them does,
    and ends them when it has no more use for them."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # which lets signals in again when it begins
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def take_environment(environment: Mapping[str, str]) -> None:
    """Have this process's environment be that of its starter now, not of when the first worker was started."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
