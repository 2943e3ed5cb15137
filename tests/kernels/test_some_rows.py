"""Products of 17 to 64 rows: in the emulator against float64, however the work is divided; on a GPU as operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.kernels import KernelArgumentError, emulated, products, reference
from nanopd_lab.kernels.launches import DeviceLimits, TileTuning, some_rows_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDE = TileTuning(128, 64, 4, 4)
TUNINGS = {
    "even": WIDE,
    "two blocks": TileTuning(64, 64, 3, 4, blocks=2),
    "deep": TileTuning(128, 128, 2, 8, l2_ahead=2),
    "wide": TileTuning(256, 64, 3, 8),
    "whole": TileTuning(128, 64, 4, 4, split=1),
    "split": TileTuning(64, 64, 4, 4, split=3),
}


def product(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (a slice of something wider), W and a residual (likewise)."""
    generator = torch.Generator().manual_seed(rows * n + k)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return rand(rows, k + 64)[:, :k], rand(n, k), rand(rows, n + 2)[:, :n]


def wanted(x: torch.Tensor, weight: torch.Tensor, add: torch.Tensor | None) -> torch.Tensor:
    out = x.double() @ weight.double().T
    return out if add is None else out + add.double()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 32, 33, 48, 64])
@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_equals_float64(dtype: torch.dtype, rows: int, tuning: TileTuning) -> None:
    x, weight, add = product(rows, 272, 384, dtype)  # neither whole tiles nor an even number of slices a block
    for residual in (None, add):
        out, _ = emulated.some_rows(x, weight, residual, tuning=tuning, limits=DeviceLimits(5))
        assert reference.relative_error(out, wanted(x, weight, residual)) <= reference.TOLERANCES[dtype]


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_clean_when_watched(tuning: TileTuning) -> None:
    x, weight, add = product(33, 144, 256, BF16)
    out, result = emulated.some_rows(x, weight, add, instrument=True, tuning=tuning, limits=DeviceLimits(3))
    assert reference.relative_error(out, wanted(x, weight, add)) <= 8e-3
    assert result.findings == ()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 64),
    n=st.integers(1, 24).map(lambda x: 16 * x),
    k=st.integers(1, 9).map(lambda x: 64 * x),
    blocks=st.integers(1, 40),
)
def test_any_size_on_any_device(rows: int, n: int, k: int, blocks: int) -> None:
    x, weight, add = product(rows, n, k, BF16)
    out, _ = emulated.some_rows(x, weight, add, tuning=WIDE, limits=DeviceLimits(blocks))
    assert reference.relative_error(out, wanted(x, weight, add)) <= 8e-3


def test_a_rows_product_does_not_depend_on_the_other_rows() -> None:
    x, weight, _ = product(64, 144, 320, BF16)
    together, _ = emulated.some_rows(x, weight)
    for rows in (1, 20, 40):
        fewer, _ = emulated.some_rows(x[:rows], weight)
        assert torch.equal(fewer, together[:rows])


@pytest.mark.parametrize(
    ("dtype", "rows", "n", "k"), [(FP32, 20, 32, 64), (BF16, 65, 32, 64), (BF16, 20, 40, 64), (BF16, 20, 32, 96)]
)
def test_what_does_not_fit_is_refused(dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    with pytest.raises(KernelArgumentError, match=r"some_rows takes .* use torch.nn.functional.linear"):
        some_rows_launch(dtype, rows, n, k)
