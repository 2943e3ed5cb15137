"""A worker of the tests as a program of its own, in a network of its own: `python -m tests.transfer.far_worker`.

Not forked like the others, because UCX finds network cards in /sys, which `ip netns exec` mounts anew.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from pathlib import Path

import torch

from tests.transfer.workers import Remote, contents, serve


class _Program(subprocess.Popen):
    """With the names of a multiprocessing.Process."""

    def join(self) -> None:
        self.wait(60)


@contextmanager
def far_worker(
    namespace: str, kind: str, name: str, num_blocks: int, size: tuple[int, ...], seed: int, folder: Path
) -> Iterator[Callable[[], Remote]]:
    """As `remote_worker`, in a network namespace; to be called when others have been started beside it."""
    with Listener(str(folder / name), "AF_UNIX", authkey=b"test") as listener:
        listener._listener._socket.settimeout(60)  # type: ignore[attr-defined]
        words = [str(folder / name), kind, name, str(num_blocks), ",".join(map(str, size)), str(seed)]
        process = _Program(
            ["ip", "netns", "exec", namespace, sys.executable, "-m", "tests.transfer.far_worker", *words],
            cwd=Path(__file__).parents[2],
        )

        def ready() -> Remote:
            pipe = listener.accept()
            assert pipe.poll(60), "the worker did not start"
            expected = contents((num_blocks, *size), seed).view(num_blocks, -1).view(torch.uint8)
            return Remote(name, pipe.recv(), process, pipe, expected)

        try:
            yield ready
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    path, kind, name, num_blocks, size, seed = sys.argv[1:]
    with Client(path, "AF_UNIX", authkey=b"test") as pipe:
        serve(kind, name, int(num_blocks), tuple(map(int, size.split(","))), "cpu", int(seed), pipe)  # type: ignore[arg-type]
