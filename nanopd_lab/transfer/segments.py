"""Memory that several processes map, and that cannot be leaked.

On Linux a segment is an anonymous file of the kernel (memfd_create). Another process opens it through the creator's
`/proc/<pid>/fd`, so it has no name to clean up: the kernel frees it when its creator has closed it or died, by
whatever signal, and the last mapping is gone. Nor does the size of /dev/shm (64 MB in many containers) limit it.
`multiprocessing.shared_memory`, the obvious choice, keeps what a killed worker made until the parent process
ends, and unmaps memory under tensors that still look at it.

Elsewhere (macOS) it is a file in the folder for temporary files, deleted when its creator closes it or exits.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import uuid
import weakref
from collections.abc import Mapping, MutableSequence
from pathlib import Path
from typing import Any

import torch

from nanopd_lab.transfer.base import TransferError

ANONYMOUS = sys.platform == "linux"


class Segment:
    """A piece of zeroed memory that this process made.

    Pages are taken from the system when they are first touched. Mappings stay valid after `close`, here and in other
    processes, until their tensors are gone; `close` only makes it unreachable for newcomers.

    Args:
        num_bytes: at least 1
        anonymous: False uses a named file also on Linux
    """

    def __init__(self, num_bytes: int, anonymous: bool = ANONYMOUS) -> None:
        name = f"nanopd-{uuid.uuid4().hex}"
        if anonymous:
            descriptor = os.memfd_create(name)
            # pids and descriptors are re-used; the name tells a newcomer that it has found the right one.
            self.details: dict[str, Any] = {"pid": os.getpid(), "fd": descriptor, "name": name}
            self._finalizer: weakref.finalize[..., Any] = weakref.finalize(self, os.close, descriptor)
        else:
            path = Path(tempfile.gettempdir(), name)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            self.details = {"path": str(path)}
            self._finalizer = weakref.finalize(self, _unlink, path)
        self.details["num_bytes"] = num_bytes
        os.truncate(descriptor, num_bytes)
        if not anonymous:
            os.close(descriptor)

    def close(self) -> None:
        """Let nobody else open it any more. Safe to call twice."""
        self._finalizer()


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _path_of(details: Mapping[str, Any]) -> Path:
    path = Path(details["path"] if "path" in details else f"/proc/{details['pid']}/fd/{details['fd']}")
    try:
        if "name" in details and details["name"] not in str(path.readlink()):
            raise FileNotFoundError(f"{path} is something else by now")
        if path.stat().st_size < details["num_bytes"]:
            raise FileNotFoundError(f"{path} has {path.stat().st_size} bytes, not {details['num_bytes']}")
    except OSError as error:
        raise TransferError(
            f"shared memory cannot be opened: {error}. Its creator has closed it or is dead, or belongs to another "
            "user; connect again when it has been restarted"
        ) from error
    return path


def map_tensor(details: Mapping[str, Any]) -> torch.Tensor:
    """A segment as bytes: uint8 `[num_bytes]`. Mapped as long as the tensor, or a view of it, lives.

    Raises:
        TransferError: there is no such segment any more.
    """
    path = _path_of(details)
    return torch.from_file(str(path), shared=True, size=details["num_bytes"], dtype=torch.uint8)


def map_integers(details: Mapping[str, Any]) -> MutableSequence[int]:
    """A segment as 64-bit integers that are read and written one by one, each in one piece.

    Raises:
        TransferError: there is no such segment any more.
    """
    descriptor = os.open(_path_of(details), os.O_RDWR)
    try:
        mapping = mmap.mmap(descriptor, details["num_bytes"])  # keeps a descriptor of its own
    finally:
        os.close(descriptor)
    return memoryview(mapping).cast("q")  # type: ignore[return-value]  # it is one in all but name


class SharedGenerations:
    """Makes generation tables that other processes can read, and remembers where they are."""

    def __init__(self) -> None:
        self._segments: list[tuple[MutableSequence[int], Segment]] = []

    def make(self, num_blocks: int) -> MutableSequence[int]:
        """`num_blocks` zeros of 64 bits."""
        segment = Segment(8 * num_blocks)
        table = map_integers(segment.details)
        self._segments.append((table, segment))
        return table

    def details(self, table: MutableSequence[int]) -> dict[str, Any]:
        """For `map_integers` in another process.

        Raises:
            TransferError: the table was not made here.
        """
        for known, segment in self._segments:
            if known is table:
                return segment.details
        raise TransferError(
            "other processes cannot read this generation table; make it with the transport's own `generations`"
        )

    def close(self) -> None:
        """Nobody can find them any more; who has mapped them still reads them."""
        for _, segment in self._segments:
            segment.close()
        self._segments.clear()
