"""Waits until its standard input ends, which it does with the process that started this, and clears up a folder.

    python -I -S janitor.py FOLDER

Ray's processes that still work there have a moment to end, then they are killed. Needs nothing but Python itself.
"""

import shutil
import signal
import sys
import time
from contextlib import suppress
from os import getpid, kill
from pathlib import Path

PATIENCE_S = 6.0


def users_of(folder: str) -> list[int]:
    """Ray's processes that have been told of the folder, or have a file there open. None where there is no /proc."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == getpid():
            continue
        with suppress(OSError):
            command = (process / "cmdline").read_bytes()
            told = b"/ray/" in command and folder.encode() in command
            if told or (command.startswith(b"ray::") and _open_in(process, folder)):
                found.append(int(process.name))
    return found


def _open_in(process: Path, folder: str) -> bool:
    return any(str(each.readlink()).startswith(folder) for each in (process / "fd").iterdir())


def clear(folder: str, patience_s: float = PATIENCE_S) -> None:
    """See the module."""
    deadline = time.monotonic() + patience_s
    while (users := users_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in users:
        with suppress(OSError):
            kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.stdin.buffer.read()
    clear(sys.argv[1])
