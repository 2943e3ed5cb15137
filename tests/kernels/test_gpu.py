"""Every kernel on a real GPU against float64, in CUDA graphs and under torch.compile. Skipped where there is
none."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from nanopd_lab.attention.base import AttentionMetadata
from nanopd_lab.attention.cuda import CudaBackend
from nanopd_lab.kernels import KernelArgumentError, empty, ops, reference, run
from nanopd_lab.kernels.decode_launches import RUNGS
from nanopd_lab.kernels.problems import Problem, make_problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here"),
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
RAGGED = [1, 700, 3, 0, 33, 2500, 16, 129]


def decode(problem: Problem, rung: str) -> torch.Tensor:
    workspace = ops.make_workspace(problem.shape, "cuda")
    out = ops.paged_decode(
        problem.query,
        problem.kv_layer,
        problem.block_tables,
        problem.context_lens,
        workspace,
        problem.scale,
        rung,
    )
    assert int(workspace[: 4 << 16].sum()) == 0, "counters must be zero again"
    return out


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_over_all_shapes(rung: str, dtype: torch.dtype) -> None:
    if rung == "mma" and dtype == torch.float32:
        pytest.skip("tensor cores take 16-bit types; fp32 is rung split's")
    combinations = list(itertools.product((64, 128, 256), (8, 16, 32), range(1, 9)))
    for i, (head_dim, block_size, group) in enumerate(combinations[:: 2 if rung in ("split", "mma") else 7]):
        problem = make_problem(dtype, head_dim, block_size, group, 1 + i % 3, RAGGED, seed=i, device="cuda")
        error = reference.relative_error(decode(problem, rung), problem.wanted())
        assert error <= reference.TOLERANCES[dtype], (head_dim, block_size, group, error)


@pytest.mark.parametrize("rung", ["split", "mma"])
def test_very_long_context_among_short_ones(rung: str) -> None:
    problem = make_problem(
        torch.bfloat16, 128, 16, 4, 2, [5, 131072, 64, 40000, 1] + [100] * 40, device="cuda", layers=1
    )
    for _ in range(3):  # a race would move the error
        assert (
            reference.relative_error(decode(problem, rung), problem.wanted())
            <= reference.TOLERANCES[torch.bfloat16]
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prefill_over_all_shapes(dtype: torch.dtype) -> None:
    contexts, query_lens = [37, 300, 1000, 20, 64], [37, 50, 257, 1, 64]
    for i, (head_dim, block_size, group) in enumerate(
        itertools.product((64, 128, 256), (8, 16, 32), range(1, 9))
    ):
        problem = make_problem(dtype, head_dim, block_size, group, 1 + i % 3, contexts, query_lens, i, "cuda")
        out = ops.paged_prefill(
            problem.query,
            problem.kv_layer,
            problem.block_tables,
            problem.context_lens,
            problem.query_start,
            ops.make_workspace(problem.shape, "cuda"),
            problem.scale,
        )
        error = reference.relative_error(out, problem.wanted())
        assert error <= reference.TOLERANCES[dtype], (head_dim, block_size, group, error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_prefill_of_chunks_after_a_long_past(dtype: torch.dtype) -> None:
    """Divided tiles: right, the same at every launch, and their counters zero again."""
    for i, (head_dim, block_size, group) in enumerate(((64, 16, 3), (128, 16, 4), (256, 32, 8), (128, 8, 1))):
        for contexts, query_lens in (
            ([5000], [1]),
            ([9000, 0, 3000, 300], [16, 4, 70, 300]),
            ([700] * 40, [3] * 40),
        ):
            problem = make_problem(dtype, head_dim, block_size, group, 2, contexts, query_lens, i, "cuda")
            workspace = ops.make_workspace(problem.shape, "cuda")
            args = (
                problem.kv_layer,
                problem.block_tables,
                problem.context_lens,
                problem.query_start,
                workspace,
            )
            out = ops.paged_prefill(problem.query, *args, problem.scale)
            own = torch.repeat_interleave(problem.context_lens > 0, problem.query_start.diff())
            error = reference.relative_error(out[own], problem.wanted()[own])
            assert error <= reference.TOLERANCES[dtype], (head_dim, contexts, error)
            for _ in range(5):
                again = ops.paged_prefill(problem.query, *args, problem.scale)
                assert torch.equal(again[own], out[own])
            assert int(workspace[: 4 << 16].sum()) == 0


def test_prefill_graph_replays_with_new_lengths() -> None:
    problem = make_problem(torch.bfloat16, 128, 16, 4, 8, [2000] * 4, [16] * 4, device="cuda")
    workspace = ops.make_workspace(problem.shape, "cuda")
    args = (problem.query, problem.kv_layer, problem.block_tables, problem.context_lens, problem.query_start)
    call = torch.ops.nanopd.paged_prefill
    call(*args, workspace, problem.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args, workspace, problem.scale)
    for contexts, starts in (
        ([2000, 2000, 2000, 2000], [0, 16, 32, 48, 64]),
        ([0, 16, 1900, 40], [0, 0, 16, 18, 50]),
        ([0, 0, 0, 1999], [0, 0, 0, 0, 64]),
    ):
        problem.context_lens.copy_(torch.tensor(contexts, dtype=torch.int32))
        problem.query_start.copy_(torch.tensor(starts, dtype=torch.int32))
        graph.replay()
        used = starts[-1]
        error = reference.relative_error(out[:used], problem.wanted()[:used])
        assert error <= reference.TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_and_moves(dtype: torch.dtype) -> None:
    cache = torch.randn(40, 3, 2, 2, 16, 64, device="cuda").to(dtype)
    product = torch.randn(100, 6, 64, device="cuda").to(dtype)
    key, value = product[:, :2], product[:, 2:4]
    slots = torch.randperm(640, device="cuda")[:100]
    slots[7] = -1
    expected = cache.clone()
    reference.store(key, value, expected[:, 1], slots)
    ops.kv_store(key, value, cache[:, 1], slots)
    assert torch.equal(cache, expected)
    order = torch.randperm(40, device="cuda")
    ops.copy_blocks(cache, order[:10], order[10:20])
    expected[order[10:20]] = expected[order[:10]]
    assert torch.equal(cache, expected)
    packed = ops.gather_blocks(cache, order[5:12])
    assert torch.equal(packed, expected[order[5:12]])
    ops.scatter_blocks(cache, order[20:27], packed)
    expected[order[20:27]] = packed
    assert torch.equal(cache, expected)
    other = torch.zeros_like(cache)
    ops.pull_blocks(other, order[:9], cache, order[30:39])
    assert torch.equal(other[order[:9]], cache[order[30:39]])
    assert not other[order[9:]].any()
    with pytest.raises(KernelArgumentError, match="same size and type"):
        ops.pull_blocks(other[:, :1].contiguous(), order[:9], cache, order[30:39])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_backend_on_a_mixed_batch(dtype: torch.dtype) -> None:
    """Decode steps, a chunk after a long past, a short prompt and one long enough for PyTorch's own
    kernels."""
    query_lens, contexts = [1, 1, 1, 40, 300, 1500], [5, 900, 64, 800, 300, 2000]
    problem = make_problem(dtype, 64, 16, 3, 3, contexts, query_lens, device="cuda")
    metadata = AttentionMetadata(
        torch.zeros(sum(query_lens), dtype=torch.int64, device="cuda"),
        problem.query_start,
        problem.context_lens,
        problem.block_tables,
        tuple(query_lens),
        tuple(contexts),
    )
    backend = CudaBackend(validate_values=True)
    for part in (metadata, dataclasses.replace(metadata)):
        out = backend.attend(problem.query, problem.kv_layer, part, problem.scale)
        limit = 1e-5 if dtype == torch.float32 else reference.TOLERANCES[dtype]
        assert reference.relative_error(out, problem.wanted()) <= limit


def test_graph_replays_with_new_lengths() -> None:
    """One captured graph serves other lengths and other tables: planning is on the device."""
    first = make_problem(torch.bfloat16, 128, 16, 4, 8, [40, 900, 7, 2000], seed=1, device="cuda")
    workspace = ops.make_workspace(first.shape, "cuda")
    args = [first.query.contiguous(), first.kv_layer, first.block_tables, first.context_lens]
    call = torch.ops.nanopd.paged_decode
    call(*args, workspace, first.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*args, workspace, first.scale)
    for lens in ([40, 900, 7, 2000], [1, 0, 7, 1200], [40, 3, 2, 1]):
        first.context_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        args[0].normal_()
        graph.replay()
        expected = reference.attend(*args, first.query_start, first.scale)
        assert reference.relative_error(out, expected) <= reference.TOLERANCES[torch.bfloat16]


def test_compiles_into_one_graph() -> None:
    problem = make_problem(torch.bfloat16, 64, 16, 3, 3, [40, 300], device="cuda")
    workspace = ops.make_workspace(problem.shape, "cuda")

    def layer(query: torch.Tensor) -> torch.Tensor:
        out = torch.ops.nanopd.paged_decode(
            query * 2, problem.kv_layer, problem.block_tables, problem.context_lens, workspace, problem.scale
        )
        return out + 1

    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(problem.query), layer(problem.query))


def test_bad_values_are_refused_before_launch() -> None:
    problem = make_problem(torch.bfloat16, 64, 16, 3, 3, [40, 300], device="cuda")
    problem.block_tables[1, 2] = 999
    with pytest.raises(KernelArgumentError, match=r"block_tables\[1, 2\] = 999"):
        decode(problem, "mma")


def test_run_takes_a_kernel_from_text() -> None:
    source = """__global__ void twice(const float* x, float* y, int n) {
    if (threadIdx.x < n) y[threadIdx.x] = 2 * x[threadIdx.x];
}"""
    x = np.arange(50, dtype=np.float32)
    result = run(source, "twice", 1, 64, [x, empty(50), 50], device="cuda")
    assert np.array_equal(result.outputs[1], 2 * x)
    assert "emulator" not in result.device
