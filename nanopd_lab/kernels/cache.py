"""Where compiled kernels are kept: one file each, named by the hash of all that went into it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from nanopd_lab import cache


def cache_dir() -> Path:
    """The folder of compiled kernels, in the user's cache."""
    return cache.cache_dir("kernels")


def key_of(parts: Iterable[str | bytes]) -> str:
    """A hash of `parts`; their boundaries count, so ("ab", "c") differs from ("a", "bc")."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def write_atomically(path: Path, data: bytes) -> None:
    """Write so that a reader, also in another process, sees the whole file or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o755)
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
