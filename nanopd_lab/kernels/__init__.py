"""The Python side of `cuda/`: compile, launch, emulate, and the torch ops over the kernels.

Importing this package needs neither CUDA nor `cuda-core` nor a C++ compiler; each is looked for when a kernel
is first built.
"""

from __future__ import annotations

from nanopd_lab.kernels.errors import (
    CompilerMissingError,
    KernelArgumentError,
    KernelCompileError,
    KernelFaultError,
)
from nanopd_lab.kernels.report import Counters, Finding, RunResult
from nanopd_lab.kernels.run import Uninitialised, empty, run

__all__ = [
    "CompilerMissingError",
    "Counters",
    "Finding",
    "KernelArgumentError",
    "KernelCompileError",
    "KernelFaultError",
    "RunResult",
    "Uninitialised",
    "empty",
    "run",
]
