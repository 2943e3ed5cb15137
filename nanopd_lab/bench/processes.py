"""Processes for many simulations at once, which end with the one that started them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from nanopd_lab.starting import uninterrupted


class _Quiet(ProcessPoolExecutor):
    """Its processes, which begin as tasks come, never see Ctrl-C."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        with uninterrupted():
            return super().submit(fn, *args, **kwargs)


@contextmanager
def process_pool(
    jobs: int, initializer: Callable[..., object] | None = None, initargs: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """So many processes, started afresh. What they are at is given up at once if the block ends by an error, as Ctrl-C
    is one here."""
    pool = _Quiet(jobs, multiprocessing.get_context("spawn"), initializer, initargs)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):  # `terminate_workers` from Python 3.14 on
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
