"""Compiles and loads the C++ of this folder."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch

from nanopd_lab import hostcc

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_FLAGS = (
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-Wno-psabi",
)
_VOID, _INT64 = ctypes.c_void_p, ctypes.c_int64


class AttentionProblem(ctypes.Structure):
    """`Problem` of paged_cpu.cpp."""

    _fields_ = [
        *((name, _VOID) for name in ("query", "kv", "out", "block_tables", "query_start", "context_lens")),
        *((name, _INT64) for name in ("block_stride", "kv_stride", "sequences", "max_blocks")),
        *((name, _INT64) for name in ("heads", "kv_heads", "dim", "block_size")),
        ("scale", ctypes.c_float),
    ]


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The library; compiled into the user's cache on first use (a few seconds).

    Raises:
        FileNotFoundError: there is no C++ compiler.
        hostcc.HostCompileError: the compiler refuses the source.
    """
    folder = Path(__file__).parent
    header = (folder / "vector.h").read_text()
    sources = [(folder / name).read_text() for name in ("paged_cpu.cpp", "dense_cpu.cpp")]
    text = "\n".join([header, *(source.replace('#include "vector.h"', "") for source in sources)])
    library = hostcc.load_library(text.replace("#pragma once", ""), _FLAGS)
    library.paged_attend.argtypes = [ctypes.POINTER(AttentionProblem), ctypes.c_int]
    library.paged_store.argtypes = [_VOID] * 4 + [_INT64] * 10
    library.dense_linear.argtypes = [_VOID] * 4 + [_INT64] * 3 + [ctypes.c_int]
    library.dense_rms_norm.argtypes = [_VOID] * 3 + [_INT64] * 2 + [ctypes.c_float, ctypes.c_int]
    for function in (library.paged_attend, library.paged_store, library.dense_linear, library.dense_rms_norm):
        function.restype = None
    return library


@lru_cache(maxsize=1)
def available() -> bool:
    """True if the library can be used here (compiling it now if that has not been done)."""
    try:
        load()
    except (OSError, hostcc.HostCompileError):
        return False
    return True
