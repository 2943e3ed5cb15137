"""Products on a CPU by our own kernel, against float64."""

from __future__ import annotations

import pytest
import torch

from nanopd_lab.cpu import library
from nanopd_lab.cpu.features import _vendor_and_family
from nanopd_lab.model import inference
from nanopd_lab.model.inference import InferenceLinear

pytestmark = pytest.mark.skipif(not library.available(), reason="needs a C++ compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 48, 49, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_any_number_of_rows(
    dtype: torch.dtype, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_few_rows", lambda dtype: float("inf"))
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 96).to(dtype), torch.randn(48, 96).to(dtype)
    added = torch.randn(48).to(dtype) if bias else None
    linear = InferenceLinear(weight, added, native=True)
    found = linear(x)
    exact = x.double() @ weight.double().T + (added.double() if added is not None else 0.0)
    assert found.dtype == dtype
    # One rounding to the type at the end, of sums of 96 products in float32.
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)
    # What a token becomes depends on no other's.
    alone = torch.cat([linear(x[row : row + 1]) for row in range(rows)])
    assert torch.equal(found, alone)


@pytest.mark.parametrize(
    ("wide", "library_wide", "bf16", "expected"),
    [
        (True, False, True, (float("inf"), 6)),
        (True, False, False, (float("inf"), float("inf"))),
        (True, True, True, (48, 6)),
        (True, True, False, (48, 48)),
        (False, True, False, (0, 3)),
    ],
)
def test_who_multiplies(
    wide: bool,
    library_wide: bool,
    bf16: bool,
    expected: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All rows where the library leaves half of each register unused; few where it does not, or where the processor
    multiplies bfloat16 itself; none or hardly any where registers are short."""
    monkeypatch.setattr(inference, "has_wide_registers", lambda: wide)
    monkeypatch.setattr(inference, "library_uses_wide_registers", lambda: library_wide)
    monkeypatch.setattr(inference, "has_bf16_products", lambda: bf16)
    assert (inference._few_rows(torch.float32), inference._few_rows(torch.bfloat16)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\n\nvendor_id\t: Other\n",
            ("AuthenticAMD", 26),
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n", ("", 0)),
    ],
)
def test_what_linux_says(text: str, expected: tuple[str, int]) -> None:
    assert _vendor_and_family(text) == expected
