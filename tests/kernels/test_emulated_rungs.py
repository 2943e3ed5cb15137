"""Every rung and every other kernel, in the emulator, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.kernels import KernelArgumentError, emulated, reference
from nanopd_lab.kernels.decode_launches import RUNGS, SplitTuning
from nanopd_lab.kernels.problems import Problem, make_problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# dtype, head_dim, block_size, group, kv_heads, contexts: every value of each at least once, lengths that
# don't divide.
SHAPES = [
    (BF16, 128, 16, 4, 2, [1, 70, 0, 33, 150]),
    (FP16, 64, 8, 3, 3, [129, 5, 8]),
    (BF16, 64, 32, 1, 2, [31, 32, 33, 65]),
    (FP16, 256, 16, 8, 1, [40, 17]),
    (BF16, 128, 8, 7, 1, [66, 1]),
    (FP32, 64, 16, 3, 3, [50, 3, 16, 100]),
    (FP32, 128, 32, 2, 1, [70, 9]),
    (FP32, 256, 8, 5, 1, [30, 9]),
    (FP16, 128, 16, 6, 1, [90, 2]),
]


def decode(problem: Problem, rung: str, **options: object) -> torch.Tensor:
    out, _ = emulated.paged_decode(
        rung,
        *problem.decode_args,
        **options,
    )  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{str(s[0])[6:]}-d{s[1]}-b{s[2]}-g{s[3]}")
def test_rung_equals_float64(rung: str, shape: tuple) -> None:
    problem = make_problem(*shape)
    if rung == "mma" and shape[0] == FP32:
        with pytest.raises(KernelArgumentError, match="use rung='split'"):
            decode(problem, rung)
        return
    error = reference.relative_error(decode(problem, rung), problem.wanted())
    assert error <= reference.TOLERANCES[shape[0]]


@pytest.mark.parametrize("rung", RUNGS)
def test_rung_is_clean_when_watched(rung: str) -> None:
    """No race, no read out of bounds or of memory that nobody wrote, in a batch that splits sequences."""
    problem = make_problem(BF16, 64, 8, 3, 2, [75, 1, 0, 20])
    out, result = emulated.paged_decode(
        rung,
        *problem.decode_args,
        instrument=True,
    )
    assert result.findings == ()
    assert reference.relative_error(out, problem.wanted()) <= reference.TOLERANCES[BF16]


@settings(max_examples=40, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 400), min_size=1, max_size=6).filter(any),
    blocks=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_split_and_join_for_any_lengths_and_grid(contexts: list[int], blocks: int, seed: int) -> None:
    problem = make_problem(BF16, 64, 8, 3, 2, contexts, seed=seed)
    out = decode(problem, "mma", blocks=blocks, tuning=SplitTuning(1, 16, 2))
    assert reference.relative_error(out, problem.wanted()) <= reference.TOLERANCES[BF16]


def test_the_ladder_reads_fewer_bytes_rung_by_rung() -> None:
    """What the ladder is about, in the emulator's counters."""
    problem = make_problem(BF16, 64, 16, 4, 1, [256])
    sectors = {}
    for rung in RUNGS:
        counters = emulated.paged_decode(rung, *problem.decode_args, instrument=True, blocks=2)[1].counters
        sectors[rung] = counters.total("sectors", "global", "read")
    kv_sectors = 256 * 64 * 2 * 2 // 32
    assert sectors["naive"] > 3 * sectors["online"]  # strided reads of K
    assert sectors["online"] > 3.5 * sectors["gqa"]  # K and V once per query head
    for rung in ("gqa", "split", "mma"):  # block ids and the query come on top
        assert kv_sectors <= sectors[rung] < 1.3 * kv_sectors


@pytest.mark.parametrize(
    "shape",
    [
        (BF16, 128, 16, 4, 2, [37, 130, 20], [37, 50, 1]),
        (FP16, 64, 8, 3, 1, [100, 64], [45, 64]),
        (FP16, 256, 32, 8, 1, [70], [33]),
        (BF16, 64, 16, 1, 2, [200], [140]),
    ],
    ids=["gqa4-d128", "gqa3-d64", "gqa8-d256", "gqa1-d64"],
)
def test_prefill_equals_float64(shape: tuple) -> None:
    problem = make_problem(*shape)
    out, result = emulated.paged_prefill(
        problem.query,
        problem.kv_layer,
        problem.block_tables,
        problem.context_lens,
        problem.query_start,
        problem.scale,
        instrument=shape[1] == 64,
    )
    assert result.findings == ()
    assert reference.relative_error(out, problem.wanted()) <= reference.TOLERANCES[shape[0]]


def prefill(problem: Problem, blocks: int, warps: int, instrument: bool = False) -> tuple[float, int]:
    """Relative error of a launch, and how many parts of divided tiles it wrote."""
    args = (problem.query, problem.kv_layer, problem.block_tables, problem.context_lens, problem.query_start)
    out, result = emulated.paged_prefill(*args, problem.scale, instrument, warps, blocks)
    assert result.findings == ()
    lengths = problem.query_start.diff()
    own = torch.repeat_interleave(problem.context_lens > 0, lengths)
    assert out[~own].isnan().all(), "rows of sequences without context are left alone"
    sums = result.outputs[-2].view(-1, 16 * (4 if problem.shape.head_dim == 256 else warps), 2)
    parts = int((~sums[:, 0, 0].isnan()).sum())
    return reference.relative_error(out[own], problem.wanted()[own]), parts


@pytest.mark.parametrize(
    ("shape", "blocks", "warps", "least"),
    [
        ((BF16, 64, 16, 4, 1, [700], [3]), 12, 1, 6),
        ((BF16, 128, 16, 4, 2, [700, 0, 300, 40], [3, 5, 40, 40]), 20, 2, 4),
        ((FP16, 256, 32, 8, 1, [500], [9]), 9, 4, 4),
        ((BF16, 64, 8, 3, 1, [400] * 35, [1] * 35), 70, 1, 70),  # more sequences than lanes
    ],
    ids=["one-chunk", "mixture", "d256", "many-sequences"],
)
def test_a_long_past_is_divided(shape: tuple, blocks: int, warps: int, least: int) -> None:
    error, parts = prefill(make_problem(*shape), blocks, warps, instrument=True)
    assert parts >= least
    assert error <= reference.TOLERANCES[shape[0]]


def test_prompts_without_a_past_are_not_divided() -> None:
    error, parts = prefill(make_problem(BF16, 64, 16, 4, 1, [300, 90], [300, 80]), 64, 1)
    assert parts == 0
    assert error <= reference.TOLERANCES[BF16]


CHUNK = st.tuples(st.sampled_from([1, 2, 5, 17, 40]), st.sampled_from([0, 1, 63, 200, 500]))


@given(
    st.lists(CHUNK, min_size=1, max_size=5),
    st.sampled_from([(16, 4), (8, 3), (32, 1), (16, 8)]),
    st.sampled_from([1, 2, 7, 33]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 5),
)
@settings(max_examples=25, deadline=None)
def test_prefill_of_any_batch(
    chunks: list[tuple[int, int]], constants: tuple[int, int], blocks: int, warps: int, padding: int
) -> None:
    contexts, lengths = [count + past for count, past in chunks], [count for count, _ in chunks]
    contexts.insert(padding % len(contexts), 0)
    lengths.insert(padding % len(lengths), padding)
    problem = make_problem(BF16, 64, *constants, 2, contexts, lengths)
    error, _ = prefill(problem, blocks, warps)
    assert error <= reference.TOLERANCES[BF16]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_store(dtype: torch.dtype) -> None:
    cache = torch.randn(6, 2, 2, 3, 8, 64).to(dtype)
    product = torch.randn(17, 9, 64).to(dtype)
    slots = torch.randperm(48)[:17]
    slots[3] = -1
    expected = cache.clone()
    reference.store(product[:, :3], product[:, 3:6], expected[:, 1], slots)
    result = emulated.kv_store(product[:, :3], product[:, 3:6], cache[:, 1], slots, instrument=True)
    assert torch.equal(cache, expected)
    writes = [line for line in result.counters.lines if line.kind == "write"]
    assert sum(line.sectors for line in writes) * 32 == sum(
        line.bytes for line in writes
    )  # full sectors only


def test_copy_gather_scatter_and_pull() -> None:
    cache = torch.randn(6, 2, 2, 2, 8, 64)
    expected = cache.clone()
    sources, targets = torch.tensor([1, 2]), torch.tensor([4, 0])
    emulated.move_blocks(cache, sources, cache, targets, 2, instrument=True)
    expected[targets] = expected[sources]
    assert torch.equal(cache, expected)
    packed = torch.empty(2, *cache.shape[1:])
    emulated.move_blocks(cache, targets, packed, None, 2)
    assert torch.equal(packed, expected[targets])
    emulated.move_blocks(packed, None, cache, torch.tensor([5, 3]), 2)
    expected[[5, 3]] = packed
    assert torch.equal(cache, expected)
    pool = torch.zeros(4, *cache.shape[1:])
    emulated.move_blocks(cache, torch.tensor([5, 0, 2]), pool, torch.tensor([1, 3, 0]), 3, instrument=True)
    assert torch.equal(pool[[1, 3, 0]], cache[[5, 0, 2]])
    assert not pool[2].any()


def product(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (a slice of something wider), W and a residual."""
    generator = torch.Generator().manual_seed(rows * n + k)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return rand(rows, k + 64)[:, :k], rand(n, k), rand(rows, n)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("rows", [1, 5, 8, 9, 16, 27, 64])
@pytest.mark.parametrize(("n", "k"), [(32, 32), (96, 288), (32, 1024)])
@pytest.mark.parametrize("residual", [False, True])
def test_products_of_few_rows(dtype: torch.dtype, rows: int, n: int, k: int, residual: bool) -> None:
    x, weight, add = product(rows, n, k, dtype)
    out, _ = emulated.few_rows(x, weight, add if residual else None)
    wanted = x.double() @ weight.double().T + (add.double() if residual else 0)
    assert reference.relative_error(out, wanted) <= reference.TOLERANCES[dtype]


@pytest.mark.parametrize("rows", [3, 12, 33])
def test_products_of_few_rows_are_clean_when_watched(rows: int) -> None:
    x, weight, add = product(rows, 64, 320, BF16)
    out, result = emulated.few_rows(x, weight, add, instrument=True)
    assert reference.relative_error(out, x.double() @ weight.double().T + add.double()) <= 8e-3
    assert result.findings == ()


def test_a_rows_product_does_not_depend_on_the_other_rows() -> None:
    x, weight, _ = product(8, 64, 320, BF16)
    together, _ = emulated.few_rows(x, weight)
    for row in range(8):
        alone, _ = emulated.few_rows(x[row : row + 1], weight)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(
    ("dtype", "rows", "n", "k"), [(FP32, 1, 32, 32), (BF16, 65, 32, 32), (BF16, 1, 40, 32), (BF16, 1, 32, 40)]
)
def test_products_that_do_not_fit_are_refused(dtype: torch.dtype, rows: int, n: int, k: int) -> None:
    with pytest.raises(KernelArgumentError, match=r"few_rows takes .* use torch.nn.functional.linear"):
        emulated.few_rows(torch.zeros(rows, k, dtype=dtype), torch.zeros(n, k, dtype=dtype))
