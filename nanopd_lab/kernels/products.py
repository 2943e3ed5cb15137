"""Products with a weight matrix as torch operators: up to 64 rows by our kernels, more by cuBLAS.

`torch.ops.nanopd.linear(x, weight)` and `linear_add(x, weight, residual)`: `x [..., k]`, `weight [n, k]`, `residual`
and the result `[..., n]`. The choice is made where the operator runs, so that a compiled model holds no branch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanopd_lab.kernels import gpu
from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import Launch
from nanopd_lab.kernels.product_launches import (
    MOST_FEW_ROWS,
    MOST_ROWS,
    TileTuning,
    few_rows_fits,
    few_rows_launch,
    some_rows_fits,
    some_rows_launch,
)


def few_rows(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`x [rows, k]` times the transpose of `weight [n, k]`, plus `residual [rows, n]`, by `cuda/few_rows.cu`.

    Raises KernelArgumentError unless types and sizes fit, see `few_rows_launch`.
    """
    launch = few_rows_launch(x.dtype, x.shape[0], weight.shape[0], x.shape[1])
    _check("few_rows", x, weight, residual)
    return _multiply(launch, x, weight, residual, x.shape[0], x.shape[1])


def some_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None = None,
    tuning: TileTuning | None = None,
) -> torch.Tensor:
    """As `few_rows`, by `cuda/some_rows.cu`, see `some_rows_launch`."""
    (rows, k), n = x.shape, weight.shape[0]
    launch = some_rows_launch(x.dtype, rows, n, k, gpu.limits_of(x.device.index), tuning)
    _check("some_rows", x, weight, residual)
    return _multiply(launch, x, weight, residual, rows, n, k)


def _check(name: str, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    (rows, k), n = x.shape, weight.shape[0]
    if x.dtype != weight.dtype or weight.shape[1] != k or not weight.is_contiguous() or x.stride(1) != 1:
        raise KernelArgumentError(
            f"{name} takes x {list(x.shape)} with unit stride and a contiguous weight [n, {k}] of the same type, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if residual is not None and (residual.shape != (rows, n) or residual.stride(1) != 1):
        raise KernelArgumentError(
            f"residual must be [{rows}, {n}] with unit stride, got {list(residual.shape)}"
        )


def _multiply(
    launch: Launch, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, *sizes: int
) -> torch.Tensor:
    """The result of `launch`, whose last arguments are `sizes`."""
    rows, n = x.shape[0], weight.shape[0]
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    args = [
        out, ctypes.c_longlong(n), x, ctypes.c_longlong(x.stride(0)), weight, residual,
        ctypes.c_longlong(0 if residual is None else residual.stride(0)), *sizes,
    ]  # fmt: skip
    gpu.execute(launch, args, x.device)
    return out


@functools.lru_cache(maxsize=16)
def most_rows(device: torch.device) -> int:
    """The most rows that our kernels multiply there. `some_rows` is for Hopper: its clusters and its products."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return MOST_ROWS if hopper else MOST_FEW_ROWS


def _kernel_for(x: torch.Tensor, weight: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """`few_rows` or `some_rows`, or None where cuBLAS is to multiply."""
    (rows, k), n = x.shape, weight.shape[0]
    if rows > most_rows(x.device) or x.data_ptr() % 16 or x.stride(0) % 8:
        return None
    if rows <= MOST_FEW_ROWS:
        return few_rows if few_rows_fits(x.dtype, rows, n, k) else None
    return some_rows if some_rows_fits(x.dtype, rows, n, k) else None


def _linear_cuda(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    kernel = _kernel_for(flat, weight)
    out = F.linear(flat, weight) if kernel is None else kernel(flat, weight)
    return out.view(*x.shape[:-1], weight.shape[0])


def _linear_add_cuda(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    flat, add = x.reshape(-1, x.shape[-1]), residual.reshape(-1, weight.shape[0])
    kernel = _kernel_for(flat, weight)
    out = torch.addmm(add, flat, weight.t()) if kernel is None else kernel(flat, weight, add)
    return out.view(residual.shape)


def _linear_add_cpu(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return residual + F.linear(x, weight)


_library = torch.library.Library("nanopd", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight) -> Tensor")
_library.define("linear_add(Tensor x, Tensor weight, Tensor residual) -> Tensor")
_library.impl("linear", _linear_cuda, "CUDA")
_library.impl("linear", F.linear, "CPU")
_library.impl("linear_add", _linear_add_cuda, "CUDA")
_library.impl("linear_add", _linear_add_cpu, "CPU")


@torch.library.register_fake("nanopd::linear", lib=_library)
def _linear_fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("nanopd::linear_add", lib=_library)
def _linear_add_fake(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return residual.new_empty(residual.shape)
