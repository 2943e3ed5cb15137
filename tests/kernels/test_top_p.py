"""The search for top_p's threshold against its definition, in the emulator and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.core import SamplingParams
from nanopd_lab.kernels import emulated
from nanopd_lab.kernels.selection import top_p_threshold
from nanopd_lab.model.sampling import Recipe, SamplingRow, draw

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def problem(logits: torch.Tensor, top_p: float) -> Problem:
    """(logits, weights, target) as `sampling` has them."""
    logits = logits - logits.amax(-1, keepdim=True)
    weights = logits.exp()
    return logits, weights, top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)


def check(logits: torch.Tensor, weights: torch.Tensor, target: torch.Tensor, found: torch.Tensor) -> None:
    """Enough with the threshold, too little without it and its ties, with exact sums."""
    for x, w, wanted, threshold in zip(logits, weights, target, found, strict=True):
        assert threshold in x or threshold == -math.inf
        assert math.fsum(w[x >= threshold].tolist()) >= wanted * (1 - 1e-12)
        assert math.fsum(w[x > threshold].tolist()) < wanted * (1 + 1e-12)


KINDS = {
    "normal": lambda noise: 4 * noise,
    "ties": lambda noise: noise.round(),
    "one value": lambda noise: 0 * noise,
    "flat": lambda noise: 1e-6 * noise,
    "peaked": lambda noise: noise.clamp(max=1).index_fill(-1, torch.tensor([0]), 30.0),
    "wide": lambda noise: 60 * noise,
    "filtered": lambda noise: noise.masked_fill(noise < -0.5, -math.inf),
}


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    vocab=st.sampled_from([1, 2, 7, 128, 129, 600, 1024]),
    rows=st.integers(1, 3),
    top_p=st.one_of(st.floats(0.001, 0.999), st.sampled_from([1e-12, 0.5, 1 - 1e-9])),
    seed=st.integers(0, 100),
)
def test_it_is_where_the_sum_reaches_the_target(
    kind: str, vocab: int, rows: int, top_p: float, seed: int
) -> None:
    noise = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    noise[:, 0] = noise[:, 0].abs()
    logits, weights, target = problem(KINDS[kind](noise), top_p)
    found, _ = emulated.top_p_threshold(logits, weights, target)
    check(logits, weights, target, found)


def test_it_is_clean_when_watched_and_the_same_in_every_row() -> None:
    logits, weights, target = problem(torch.randn(1, 516).expand(3, -1), 0.9)
    found, result = emulated.top_p_threshold(logits, weights, target, instrument=True)
    assert result.findings == ()
    check(logits, weights, target, found)
    assert len(set(found.flatten().tolist())) == 1


def test_nothing_is_cut_from_what_never_reaches_the_target() -> None:
    logits, weights, target = problem(torch.tensor([[0.0, math.nan, -1.0], [0.0, -2.0, -1.0]]), 0.9)
    target[1] = 2.0
    found, _ = emulated.top_p_threshold(logits, weights, target)
    assert found.flatten().tolist() == [-math.inf, -math.inf]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none here")
def test_a_real_vocabulary_on_a_gpu_without_waiting_for_it() -> None:
    noise = torch.randn(64, 151_936, generator=torch.Generator().manual_seed(0))
    for make in (KINDS["normal"], KINDS["ties"], KINDS["flat"], KINDS["peaked"]):
        logits, weights, target = problem(make(noise), 0.9)
        found = top_p_threshold(logits.cuda(), weights.cuda(), target.cuda())
        check(logits[:5], weights[:5], target[:5], found[:5].cpu())
    params = [SamplingParams(top_p=0.9), SamplingParams(top_p=0.8, top_k=50, min_p=0.01), SamplingParams()]
    rows = [SamplingRow(params[row % 3], row, row, 0, 0) for row in range(64)]
    on_gpu = noise.cuda()
    draw(on_gpu, Recipe(rows, noise.shape[1], on_gpu.device)).result()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = draw(on_gpu, Recipe(rows, noise.shape[1], on_gpu.device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(token.error is None for token in drawn.result())
