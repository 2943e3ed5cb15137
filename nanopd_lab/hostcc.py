"""Compile C++ with the host's compiler into a shared library, once per source, flags and processor."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from nanopd_lab.cache import cache_dir


class HostCompileError(ValueError):
    """The host compiler refused a source; the message holds its log."""


def find_compiler() -> str | None:
    """Path of a C++ compiler: $CXX, then g++, clang++, c++; None if there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (path := shutil.which(name)):
            return path
    return None


@lru_cache(maxsize=1)
def _processor() -> str:
    """What `-march=native` depends on, so that a cache shared between machines does not mix them up."""
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.exists():
        flags = next(
            (line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), ""
        )
    return f"{platform.machine()} {platform.processor()} {flags}"


def compile_library(source: str, flags: tuple[str, ...] = ("-O3",)) -> Path:
    """Compile C++ source text to a shared library in the user's cache and return its path.

    Raises:
        FileNotFoundError: no compiler; the message says what to install.
        HostCompileError: the source does not compile.
    """
    compiler = find_compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; install g++ or clang, or set CXX")
    key = hashlib.sha256("\0".join([source, *flags, compiler, _processor()]).encode()).hexdigest()[:24]
    target = cache_dir("native") / f"{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            text, built = Path(folder, "source.cpp"), Path(folder, "built.so")
            text.write_text(source)
            command = [compiler, "-std=c++17", "-shared", "-fPIC", *flags, str(text), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise HostCompileError(f"{' '.join(command)} failed:\n{result.stderr}")
            built.replace(target)  # atomic: another process sees all of it or nothing
    return target


def load_library(source: str, flags: tuple[str, ...] = ("-O3",)) -> ctypes.CDLL:
    """`compile_library`, loaded."""
    return ctypes.CDLL(str(compile_library(source, flags)))
