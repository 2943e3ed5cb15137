"""Products of 17 to 64 rows: in the emulator against float64, a block a tile; on a GPU with clusters, as operators."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.kernels import KernelArgumentError, emulated, products, reference
from nanopd_lab.kernels.launches import DeviceLimits
from nanopd_lab.kernels.product_launches import CLUSTERS, TileTuning, some_rows_launch, some_rows_tuning

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TUNINGS = {"64": TileTuning(64, 3, 1), "128": TileTuning(128, 2, 1), "deep": TileTuning(64, 6, 1)}


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
    x, weight, add = product(rows, 144, 384, dtype)
    for residual in (None, add):
        out, _ = emulated.some_rows(x, weight, residual, tuning=tuning)
        assert reference.relative_error(out, wanted(x, weight, residual)) <= reference.TOLERANCES[dtype]


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_clean_when_watched(tuning: TileTuning) -> None:
    x, weight, add = product(33, 80, 512, BF16)
    out, result = emulated.some_rows(x, weight, add, instrument=True, tuning=tuning)
    assert reference.relative_error(out, wanted(x, weight, add)) <= 8e-3
    assert result.findings == ()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 64),
    n=st.integers(1, 24).map(lambda x: 16 * x),
    k=st.integers(1, 5).map(lambda x: 128 * x),
    residual=st.booleans(),
)
def test_any_size(rows: int, n: int, k: int, residual: bool) -> None:
    x, weight, add = product(rows, n, k, BF16)
    given_add = add if residual else None
    out, _ = emulated.some_rows(x, weight, given_add)
    assert reference.relative_error(out, wanted(x, weight, given_add)) <= 8e-3


@pytest.mark.parametrize(
    ("n", "cluster"), [(6144, 1), (4096, 2), (24576, 1), (151936, 1), (2048, 3), (512, 4)]
)
def test_enough_blocks_for_the_gpu(n: int, cluster: int) -> None:
    assert some_rows_tuning(n, DeviceLimits()).cluster == cluster


def test_a_rows_product_does_not_depend_on_the_other_rows() -> None:
    x, weight, _ = product(64, 144, 384, BF16)
    together, _ = emulated.some_rows(x, weight)
    for rows in (1, 20, 40):
        fewer, _ = emulated.some_rows(x[:rows], weight)
        assert torch.equal(fewer, together[:rows])


@pytest.mark.parametrize(
    ("dtype", "rows", "n", "k"),
    [(FP32, 20, 32, 128), (BF16, 65, 32, 128), (BF16, 20, 40, 128), (BF16, 20, 32, 192)],
)
def test_what_does_not_fit_is_refused(dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    with pytest.raises(KernelArgumentError, match=r"some_rows takes .* use torch.nn.functional.linear"):
        some_rows_launch(dtype, rows, n, k)


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_on_a_gpu(dtype: torch.dtype, cluster: int) -> None:
    for rows in (17, 32, 33, 48, 50, 64):
        for n, k in ((64, 128), (144, 384), (400, 1664), (4096, 4096)):
            x, weight, add = (t.cuda() for t in product(rows, n, k, dtype))
            tuning = dataclasses.replace(some_rows_tuning(n, DeviceLimits()), cluster=cluster)
            for residual in (None, add):
                out = products.some_rows(x, weight, residual, tuning)
                error = reference.relative_error(out, wanted(x, weight, residual))
                assert error <= reference.TOLERANCES[dtype], (rows, n, k)
                assert torch.equal(out, products.some_rows(x, weight, residual, tuning)), (rows, n, k)


@pytest.mark.gpu
@hopper
def test_operators_in_a_graph_one_after_the_other() -> None:
    """Each begins before the one before it has ended: what it reads of that one must be there all the same."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1024, 1024, generator=generator).to(BF16).cuda() / 32 for _ in range(8)]
    x = torch.randn(40, 1024, generator=generator).to(BF16).cuda()

    def chain() -> torch.Tensor:
        y = x
        for i, weight in enumerate(weights):
            y = torch.ops.nanopd.linear_add(y, weight, x) if i % 2 else torch.ops.nanopd.linear(y, weight)
        return y

    expected = chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
    y = x.double()
    for i, weight in enumerate(weights):
        y = y @ weight.double().T + (x.double() if i % 2 else 0)
    assert reference.relative_error(out, y) <= 2e-2
