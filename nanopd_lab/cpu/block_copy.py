"""Copies whole blocks between two pools in CPU memory, in one thread, without holding Python's lock."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from nanopd_lab import hostcc

_FLAGS = ("-O2", "-Wno-psabi")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """copy_blocks.cpp, compiled on first use; None without a compiler."""
    try:
        library = hostcc.load_library((Path(__file__).parent / "copy_blocks.cpp").read_text(), _FLAGS)
    except (OSError, hostcc.HostCompileError):
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.copy_blocks.argtypes = [pointer, pointer, pointer, pointer, integer, integer]
    library.copy_blocks.restype = None
    return library


def prepare() -> None:
    """Compile it now (a second, once a machine) rather than within the first pull."""
    _library()


def copy_blocks(
    source: int, source_blocks: Sequence[int], target: int, target_blocks: Sequence[int], block_bytes: int
) -> None:
    """Copy block `source_blocks[i]` of one pool onto block `target_blocks[i]` of another.

    Args:
        source: address of the pool to read
        source_blocks: in range; nothing is checked here
        target: address of the pool to write, not overlapping what is read
        target_blocks: as many
        block_bytes: size of a block in both
    """
    library = _library()
    if library is None:  # ctypes' memmove gives the lock up too, but takes it back after every block
        for i, j in zip(source_blocks, target_blocks, strict=True):
            ctypes.memmove(target + j * block_bytes, source + i * block_bytes, block_bytes)
        return
    ids = ctypes.c_int64 * len(source_blocks)
    from_ids, to_ids = ids(*source_blocks), ids(*target_blocks)
    library.copy_blocks(source, from_ids, target, to_ids, len(source_blocks), block_bytes)
