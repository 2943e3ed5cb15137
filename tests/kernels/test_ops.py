"""The torch ops and the backend on a CPU, and what bad input gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from nanopd_lab.attention.base import AttentionMetadata
from nanopd_lab.attention.cuda import CudaBackend
from nanopd_lab.attention.reference import ReferenceBackend
from nanopd_lab.kernels import KernelArgumentError, decode_launches, launches, ops, validate, workspace
from nanopd_lab.kernels.decode_launches import SplitTuning, decode_launch
from nanopd_lab.kernels.launches import AttentionShape, DeviceLimits
from nanopd_lab.kernels.problems import Problem, make_problem

NOTHING = torch.zeros(0, dtype=torch.uint8)


@pytest.fixture
def problem() -> Problem:
    return make_problem(torch.float32, 64, 16, 3, 3, [40, 100])


def decode(problem: Problem, **change: torch.Tensor) -> torch.Tensor:
    given = {name: getattr(problem, name) for name in ("query", "kv_layer", "block_tables", "context_lens")}
    return ops.paged_decode(**{**given, **change}, workspace=NOTHING, scale=problem.scale)


def test_backend_equals_the_reference_backend() -> None:
    query_lens, contexts = [1, 1, 30, 600], [5, 90, 64, 700]
    problem = make_problem(torch.float32, 64, 16, 3, 3, contexts, query_lens)
    metadata = AttentionMetadata(
        torch.zeros(sum(query_lens), dtype=torch.int64),
        problem.query_start,
        problem.context_lens,
        problem.block_tables,
        tuple(query_lens),
        tuple(contexts),
    )
    out = CudaBackend(validate_values=True).attend(problem.query, problem.kv_layer, metadata, problem.scale)
    wanted = ReferenceBackend().attend(problem.query, problem.kv_layer, metadata, problem.scale)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_ops_pass_torchs_own_checks(problem: Problem) -> None:
    """Schema, fake implementation, and what torch.compile needs."""
    check = torch.library.opcheck
    tests = ("test_schema", "test_faketensor")
    attention = (problem.query, problem.kv_layer, problem.block_tables, problem.context_lens)
    check(torch.ops.nanopd.paged_decode.default, (*attention, NOTHING, problem.scale), test_utils=tests)
    check(
        torch.ops.nanopd.paged_prefill.default,
        (*attention, problem.query_start, NOTHING, problem.scale),
        test_utils=tests,
    )
    key = torch.randn(4, 3, 64)
    check(torch.ops.nanopd.kv_store.default, (key, key, problem.kv_layer, torch.arange(4)), test_utils=tests)
    ids = torch.tensor([1, 0])
    check(torch.ops.nanopd.gather_blocks.default, (problem.kv_cache, ids), test_utils=tests)
    check(torch.ops.nanopd.copy_blocks.default, (problem.kv_cache, ids[:1], ids[1:]), test_utils=tests)
    other = problem.kv_cache.clone()
    check(torch.ops.nanopd.pull_blocks.default, (other, ids, problem.kv_cache, ids), test_utils=tests)


def test_ops_compile_into_one_graph(problem: Problem) -> None:
    def layer(query: torch.Tensor) -> torch.Tensor:
        args = (problem.kv_layer, problem.block_tables, problem.context_lens, NOTHING, problem.scale)
        return torch.ops.nanopd.paged_decode(2 * query, *args) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(problem.query), layer(problem.query))


def test_moves_on_a_cpu() -> None:
    cache = torch.randn(6, 2, 2, 1, 8, 64)
    before, ids = cache.clone(), torch.tensor([4, 1])
    ops.copy_blocks(cache, ids, torch.tensor([0, 2]))
    assert torch.equal(cache[[0, 2]], before[ids])
    ops.scatter_blocks(cache, torch.tensor([5, 3]), ops.gather_blocks(cache, ids))
    assert torch.equal(cache[[5, 3]], before[ids])
    other = torch.zeros(3, *cache.shape[1:])
    ops.pull_blocks(other, torch.tensor([2, 0]), cache, ids)
    assert torch.equal(other[[2, 0]], cache[ids])
    assert other[1].abs().sum() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"query": p.query[0]}, r"query must be \[tokens, heads, head_dim=64\]"),
        (lambda p: {"query": p.query.half()}, "convert one of them"),
        (lambda p: {"query": p.query.mT.contiguous().mT}, "contiguous within a token"),
        (lambda p: {"query": torch.randn(2, 8, 64)}, "multiples of kv_heads=3"),
        (lambda p: {"query": torch.randn(2, 27, 64)}, "1 to 8"),
        (lambda p: {"kv_layer": p.kv_layer[:, 0]}, r"must be \[num_blocks, 2, kv_heads"),
        (lambda p: {"kv_layer": p.kv_layer.transpose(2, 3)}, "contiguous inside a block"),
        (lambda p: {"kv_layer": p.kv_layer.double(), "query": p.query.double()}, "dtype=torch.float64"),
        (lambda p: {"block_tables": p.block_tables.long()}, "block_tables must be torch.int32"),
        (lambda p: {"block_tables": p.block_tables[:1]}, "1 rows for 2 context_lens"),
        (lambda p: {"context_lens": p.context_lens + 1000}, "allowed are 0 to 112"),
        (lambda p: {"context_lens": p.context_lens - 100}, "reach from -60"),
        (
            lambda p: {"block_tables": p.block_tables + 100},
            r"block_tables\[0, 0\] = \d+: block ids of this cache",
        ),
        (lambda p: {"block_tables": p.block_tables - 100}, "block ids of this cache are 0 to"),
    ],
)
def test_bad_attention_input(problem: Problem, change: Callable, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        decode(problem, **change(problem))


def test_ids_past_a_context_are_not_looked_at(problem: Problem) -> None:
    problem.block_tables[0, 3:] = 10**6
    assert torch.isfinite(decode(problem)).all()


def test_bad_slots_and_block_ids(problem: Problem) -> None:
    key = torch.randn(1, 3, 64)
    with pytest.raises(KernelArgumentError, match="the cache has slots 0 to"):
        ops.kv_store(key, key, problem.kv_layer, torch.tensor([10**6]))
    with pytest.raises(KernelArgumentError, match="to_ids reach from 99 to 99"):
        ops.copy_blocks(problem.kv_cache, torch.tensor([0]), torch.tensor([99]))
    pools = (problem.kv_cache, torch.tensor([0, 1]), problem.kv_cache.clone(), torch.tensor([0, -1]))
    with pytest.raises(KernelArgumentError, match="from_ids reach from -1 to 0"):
        ops.pull_blocks(*pools)
    starts = torch.tensor([0, 50, 60], dtype=torch.int32)
    with pytest.raises(KernelArgumentError, match="more query tokens than context"):
        validate.check_query_start(torch.zeros(60, 9, 64), starts, problem.context_lens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 96}, r"head_dim=96 .* \(64, 128, 256\)"),
        ({"block_size": 24}, "block_size=24"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"heads": 33}, "heads=33"),
        ({"kv_heads": 2}, "query heads per KV head=16"),
    ],
)
def test_unsupported_shapes_name_the_way_out(change: dict, message: str) -> None:
    given = {"dtype": torch.bfloat16, "heads": 32, "kv_heads": 8, "head_dim": 128, "block_size": 16, **change}
    with pytest.raises(KernelArgumentError, match=message) as caught:
        AttentionShape(**given)
    assert "use the torch backend" in str(caught.value)


def test_launch_limits() -> None:
    shape = AttentionShape(torch.bfloat16, 32, 8, 128, 16)
    with pytest.raises(KernelArgumentError, match="use another rung"):
        decode_launch("naive", shape, 1, 131072)
    with pytest.raises(KernelArgumentError, match="choose from naive, online"):
        decode_launch("fastest", shape, 1, 512)
    with pytest.raises(KernelArgumentError, match="split the batch"):
        decode_launch("mma", shape, 10_000, 512)
    with pytest.raises(KernelArgumentError, match="zeroed once"):
        workspace.split_workspace(torch.zeros(8, dtype=torch.uint8), shape, 10)


@pytest.mark.parametrize(
    "limits", [DeviceLimits(108, 163 * 1024, 164 * 1024), DeviceLimits()], ids=["sm_80", "sm_90"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_shape_fits_in_shared_memory(limits: DeviceLimits, dtype: torch.dtype) -> None:
    for head_dim in launches.HEAD_DIMS:
        for block_size in launches.BLOCK_SIZES:
            for group in range(1, 9):
                for sequences in (1, 64):
                    shape = AttentionShape(dtype, group, 1, head_dim, block_size)
                    launch = decode_launch(decode_launches.best_rung(shape), shape, sequences, 512, limits)
                    assert launch.shared_bytes <= limits.shared_bytes_per_block
                    assert launch.grid[0] <= decode_launches.max_grid(limits)


def test_stage_arithmetic() -> None:
    shape = AttentionShape(torch.bfloat16, 32, 8, 128, 16)
    tuning = SplitTuning(4, 16, 2)
    assert tuning.stage_bytes(shape) == (32 + 4) * 256
    assert dataclasses.replace(tuning, stages=3).shared_bytes(shape) == 110_592
    assert tuning.blocks_per_multiprocessor(shape, DeviceLimits()) == 2
