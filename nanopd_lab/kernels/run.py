"""One call for a kernel written in a notebook cell: emulated on a CPU, launched on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanopd_lab.kernels import emulator
from nanopd_lab.kernels.arguments import Uninitialised
from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.report import RunResult


def empty(shape: int | Sequence[int], dtype: str = "float32") -> Uninitialised:
    """An output array for `run` that counts as unwritten."""
    return Uninitialised((shape,) if isinstance(shape, int) else tuple(shape), dtype)


def run(
    source: str,
    kernel: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    *,
    shared_bytes: int = 0,
    device: str = "auto",
    defines: Mapping[str, object] | None = None,
    instrument: bool = True,
    check: bool = True,
    max_steps: int = 2_000_000_000,
    name: str = "kernel.cu",
) -> RunResult:
    """Compile the CUDA C++ in `source` and launch `kernel` once.

    args: one a parameter: numpy arrays, torch tensors (views pass their strides' memory), numbers,
    `empty(…)`. Arrays are written in place and returned in `RunResult.outputs`. device: "emulator", "cuda",
    or "auto" (a GPU where torch sees one). `instrument` (emulator only) watches every access and fills the
    counters; without it the kernel runs some hundred times faster. `check` raises KernelFaultError on any
    finding.

    Raises KernelCompileError, KernelArgumentError, KernelFaultError, CompilerMissingError; all ValueErrors.
    """
    if device not in ("auto", "emulator", "cuda"):
        raise KernelArgumentError(f"device={device!r}: use 'auto', 'emulator' or 'cuda'")
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "emulator"
    if device == "cuda":
        from nanopd_lab.kernels import gpu

        return gpu.run(source, kernel, grid, block, args, shared_bytes, defines, name)
    built = emulator.build(source, kernel, defines, watched=instrument, name=name)
    return emulator.launch(built, grid, block, args, shared_bytes, check, max_steps)
