"""Modules of a loaded model swapped for faster ones with the same meaning; the modelling code stays as it is.

q, k, v (and gate, up)   read the same input: their weights are stacked and multiplied once
nn.Linear                few rows: our kernels, which stream the weights once at the memory's speed; on some CPUs all
RMSNorm on a CPU         one call instead of eight
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nanopd_lab.cpu import library
from nanopd_lab.cpu.features import has_bf16_products, has_wide_registers, library_uses_wide_registers
from nanopd_lab.kernels.gpu import can_compile
from nanopd_lab.kernels.products import most_rows  # which registers the operators

# Sibling projections that read the same input, by attribute name.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Products with at most this many rows go to our kernel, larger ones to the library's. With AVX2 sums spill out of the
# registers: at 8 rows of float32 ours takes 2.4 times the library's time, at 48 4.4 times (AMD EPYC 7003). Where the
# library leaves half of each register unused ours has all: it takes 0.4 to 0.76 of the time from 4 rows to 1,024 (AMD
# EPYC 9005, float32, one thread and two), and what a token becomes depends on no other's. Where a processor multiplies
# bfloat16 itself, the library does it 1.1 times as fast as ours at 8 rows and 2.7 times at 128 (there).
FEW_ROWS = 48
FEW_ROWS_BF16 = 6
FEW_ROWS_NARROW = {torch.float32: 0, torch.bfloat16: 3}


def _few_rows(dtype: torch.dtype) -> float:
    if not has_wide_registers():
        return FEW_ROWS_NARROW.get(dtype, 0)
    if dtype == torch.bfloat16 and has_bf16_products():
        return FEW_ROWS_BF16
    return FEW_ROWS if library_uses_wide_registers() else math.inf


class InferenceLinear(nn.Module):
    """`y = x W^T + b` without gradients.

    Args:
        weight: `[out_features, in_features]`
        bias: `[out_features]` or None
        native: rows through `dense_linear` (float32 and bfloat16 on the CPU), few or all of them
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, native: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().contiguous(), requires_grad=False)
        fits = self.in_features % 32 == 0 and self.out_features % 16 == 0
        self._native = library.load().dense_linear if native and fits else None
        self._few_rows = _few_rows(weight.dtype)
        # On a GPU one operator that chooses by the number of rows, so that a compiled layer needs no branch.
        self.choose = weight.is_cuda and bias is None and can_compile()
        self._most_rows = most_rows(weight.device)
        self.search = False  # leave products of more rows to torch.compile's search
        # Without a unit for it a bf16 product runs at half the speed of a float32 one: widen, multiply, round.
        self._widen = native and weight.dtype == torch.bfloat16 and not has_bf16_products()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if self.choose and not (self.search and rows > self._most_rows):
            return torch.ops.nanopd.linear(x, self.weight)
        if self._native is None or rows > self._few_rows or rows == 0:
            if self._widen:
                bias = None if self.bias is None else self.bias.float()
                return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)
            return F.linear(x, self.weight, self.bias)
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        self._native(
            x.data_ptr(),
            self.weight.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            out.data_ptr(),
            rows,
            self.in_features,
            self.out_features,
            library.DTYPES[x.dtype],
        )
        return out


class InferenceRMSNorm(nn.Module):
    """Hugging Face's RMSNorm in one pass, its roundings included."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        self.eps = eps
        self._native = library.load().dense_rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        dim = x.shape[-1]
        dtype = library.DTYPES[x.dtype]
        self._native(
            x.data_ptr(), self.weight.data_ptr(), out.data_ptr(), x.numel() // dim, dim, self.eps, dtype
        )
        return out


class _FusedGroup:
    """Multiplies for all siblings when the first is asked, and hands slices of that to the others."""

    def __init__(self, linear: InferenceLinear, sizes: Sequence[int]) -> None:
        self.linear, self.sizes = linear, list(sizes)
        self.source: torch.Tensor | None = None
        self.parts: dict[int, torch.Tensor] = {}

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if self.source is not x or index not in self.parts:
            self.parts = dict(enumerate(self.linear(x).split(self.sizes, dim=-1)))
            self.source = x
        out = self.parts.pop(index)
        if not self.parts:
            self.source = None  # keep no activation alive
        return out


class FusedSlice(nn.Module):
    """One projection of a fused group; stands where the `nn.Linear` stood."""

    def __init__(self, group: _FusedGroup, index: int) -> None:
        super().__init__()
        self._group, self._index = group, index
        if index == 0:
            self.stacked = group.linear  # so that the model's parameters are all of its weights, once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._group.part(x, self._index)


def optimise(model: nn.Module, *, fuse: bool = True) -> None:
    """Swap the modules of `model` in place, one at a time, so that no second copy of the weights exists.

    Args:
        fuse: stack sibling projections
    """
    parameter = next(model.parameters())
    native = parameter.device.type == "cpu" and parameter.dtype in library.DTYPES and library.available()
    gpu = parameter.device.type == "cuda"
    for module in list(model.modules()):
        if fuse:
            for names in SIBLINGS:
                _fuse(module, names, native)
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and (native or gpu):
                setattr(module, name, InferenceLinear(child.weight, child.bias, native))
            elif (
                native and type(child).__name__.endswith("RMSNorm") and isinstance(child.weight, torch.Tensor)
            ):
                setattr(module, name, InferenceRMSNorm(child.weight, float(child.variance_epsilon)))  # type: ignore[arg-type]


def _fuse(module: nn.Module, names: Sequence[str], native: bool) -> None:
    linears = [linear for name in names if isinstance(linear := getattr(module, name, None), nn.Linear)]
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if len(linears) != len(names) or len(biases) not in (0, len(linears)):
        return
    weight = torch.cat([linear.weight for linear in linears])
    stacked = InferenceLinear(weight, torch.cat([*biases]) if biases else None, native)
    group = _FusedGroup(stacked, [linear.out_features for linear in linears])
    for index, name in enumerate(names):
        setattr(module, name, FusedSlice(group, index))
