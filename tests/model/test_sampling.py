"""Sampling against distributions computed by hand and against Hugging Face's logits warpers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nanopd_lab.core import SamplingParams
from nanopd_lab.model import sampling
from nanopd_lab.model.sampling import SamplingRow, request_seed, sample, uniform


def rows(params: SamplingParams, count: int, seed: int = 0, logits_row: int = 0) -> list[SamplingRow]:
    return [SamplingRow(params, logits_row, seed, 0, position) for position in range(count)]


def draws(logits: torch.Tensor, params: SamplingParams, count: int = 20_000) -> torch.Tensor:
    out = []
    for start in range(0, count, 2000):
        batch = [SamplingRow(params, 0, 7, 0, start + i) for i in range(2000)]
        out += [result.token for result in sample(logits[None], batch)]
    return torch.bincount(torch.tensor(out), minlength=logits.numel())


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution Hugging Face would sample from (min_p before top_k and top_p, as vLLM orders them)."""
    scores = logits[None].double()
    ids = torch.zeros(1, 1, dtype=torch.long)
    if params.temperature != 1:
        scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7, top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.3, top_k=12, top_p=0.8, min_p=0.02),
        SamplingParams(top_k=-1, top_p=0.9999),
        SamplingParams(top_k=1),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(params: SamplingParams) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    expected, counts = warped(logits, params), draws(logits, params)
    kept = expected > 0
    assert counts[~kept].sum() == 0, "a token was drawn that the filters remove"
    if kept.sum() > 1:
        frequent = expected * counts.sum() > 5  # the chi-squared test's usual condition
        observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]]).double()
        wanted = torch.cat([expected[frequent], expected[~frequent].sum()[None]]) * counts.sum()
        observed, wanted = observed[wanted > 0], wanted[wanted > 0]
        assert stats.chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_a_flat_distribution_needs_the_whole_vocabulary(top_p: float) -> None:
    """top_p over more tokens than the shortlist holds."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 0.01
    filters = sampling.Filters([SamplingParams(top_p=top_p)], 5000, logits.device)
    scaled = logits[None] - logits.max()
    threshold = filters.thresholds(scaled, scaled.exp())
    kept = (logits - logits.max() >= threshold).sum().item()
    assert kept == (warped(logits, SamplingParams(top_p=top_p)) > 0).sum().item()
    assert kept > sampling.TOP_P_SHORTLIST * 0.9


def check_top_p(logits: list[float], weights: list[float], top_p: float, threshold: float) -> None:
    """The threshold by its definition, with exact sums: enough with it, too little without it and its ties."""
    target = top_p * math.fsum(weights)
    pairs = list(zip(logits, weights, strict=True))
    assert math.fsum(w for x, w in pairs if x >= threshold) >= target * (1 - 1e-12)
    assert math.fsum(w for x, w in pairs if x > threshold) < target * (1 + 1e-12)


LOGITS = st.one_of(
    st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=60),
    st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=60),  # ties
    st.lists(st.floats(-(2**-10), 2**-10, width=32), min_size=1, max_size=60),  # almost flat
    st.lists(st.floats(-5, 0, width=32), min_size=1, max_size=60).map(lambda xs: [*xs, 40.0]),  # peaked
)
FILTERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_p=st.one_of(st.sampled_from([1e-9, 0.5, 1 - 1e-9, 1.0]), st.floats(0.01, 1.0)),
    top_k=st.sampled_from([0, 1, 2, 5, 30, 1000]),
    min_p=st.sampled_from([0.0, 1e-6, 0.3]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(LOGITS, FILTERS), min_size=1, max_size=5), st.sampled_from([4, 1024]))
def test_filters_against_a_sorted_row(
    batch: list[tuple[list[float], SamplingParams]], shortlist: int
) -> None:
    """Rows of different filters in one batch; each as if sorted alone, whether the shortlist suffices or not."""
    vocab = max(len(row) for row, _ in batch)
    logits = torch.tensor([row + [-100.0] * (vocab - len(row)) for row, _ in batch])
    each = [SamplingRow(params, row, 0, 0, 0) for row, (_, params) in enumerate(batch)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "TOP_P_SHORTLIST", shortlist)
        weights = sampling._weights(logits, sampling.Recipe(each, vocab, logits.device))
    for row, (_, params) in enumerate(batch):
        scaled = (logits[row] - logits[row].max()) / params.temperature
        if params.min_p:
            scaled[scaled < torch.tensor(params.min_p).log()] = float("-inf")
        likeliest = scaled.sort(descending=True).values[: params.top_k or vocab]
        if params.top_p < 1:
            kept = scaled[weights[row] > 0]
            check_top_p(likeliest.tolist(), likeliest.exp().tolist(), params.top_p, kept.min().item())
            expected = scaled >= kept.min()
        else:
            expected = scaled >= likeliest[-1]
        assert torch.equal(weights[row], scaled.exp() * expected)


def test_greedy_takes_the_maximum_and_mixes_with_sampling() -> None:
    logits = torch.randn(3, 100)
    greedy, hot = SamplingParams(temperature=0), SamplingParams(temperature=5.0, seed=1)
    mixed = sample(logits, [SamplingRow(p, i, 1, 0, 0) for i, p in enumerate([greedy, hot, greedy])])
    assert [mixed[0].token, mixed[2].token] == logits[[0, 2]].argmax(-1).tolist()
    alone = sample(logits, [SamplingRow(hot, 1, 1, 0, 0)])
    assert mixed[1].token == alone[0].token


def test_same_seed_same_token_whatever_the_batch() -> None:
    logits = torch.randn(8, 1000)
    params = [
        SamplingParams(temperature=0.9),
        SamplingParams(top_k=50),
        SamplingParams(top_p=0.5),
        SamplingParams(min_p=0.3, top_k=2000),
        SamplingParams(temperature=0),
    ]
    batch = [SamplingRow(params[i % 5], i, 100 + i, 0, 3) for i in range(8)]
    together = [result.token for result in sample(logits, batch)]
    alone = [sample(logits, [row])[0].token for row in batch]
    assert together == alone
    assert [result.token for result in sample(logits.flip(0), batch[::-1])] != []


def test_rounding_does_not_change_a_draw() -> None:
    """Logits of the same tokens differ in their last bits from batch to batch; a seed's tokens must not."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.2 * torch.randn(32, 49_152, generator=generator)
    logits[:, :20] += 8  # about half the probability; the other half is spread over all the rest
    changed = 0
    for position in range(20):
        batch = [SamplingRow(SamplingParams(), row, row, 0, position) for row in range(len(logits))]
        rounded = logits + 3e-6 * torch.randn(logits.shape, generator=generator)
        changed += sum(
            one.token != other.token
            for one, other in zip(sample(logits, batch), sample(rounded, batch), strict=True)
        )
    assert changed == 0


def test_samples_positions_and_requests_differ() -> None:
    points = {uniform(5, s, p) for s in range(50) for p in range(50)}
    assert len(points) == 2500
    assert stats.kstest(sorted(points), "uniform").pvalue > 1e-3
    assert len({request_seed(0, serial) for serial in range(1000)}) == 1000
    assert uniform(-1, 0, 0) != uniform(1, 0, 0)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = torch.tensor([[50.0, -50.0, 49.9, 0.0]])
    tokens = {r.token for r in sample(logits, rows(SamplingParams(temperature=temperature), 200))}
    assert tokens == {0} if temperature < 1 else tokens == {0, 1, 2, 3}


def test_logprobs_are_of_the_raw_distribution_with_ranks() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    reference = logits.log_softmax(-1)[0].tolist()
    for top in (0, 1, 3):
        (result,) = sample(logits, rows(SamplingParams(temperature=5.0, top_k=1, logprobs=top), 1))
        assert result.token == 1
        assert result.logprob == pytest.approx(reference[1])
        assert result.top_logprobs is not None
        assert list(result.top_logprobs) == [1, 3, 2][: max(top, 1)]
    (result,) = sample(logits, [SamplingRow(SamplingParams(logprobs=1), 0, 0, 0, 0, banned=(1, 2, 3))])
    assert result.top_logprobs is not None
    assert result.token == 0
    assert result.top_logprobs[0].rank == 4
    assert result.top_logprobs[1].rank == 1


def test_banned_tokens_never_come() -> None:
    logits = torch.tensor([[9.0, 1.0, 1.0]])
    for params in (SamplingParams(temperature=0), SamplingParams()):
        batch = [SamplingRow(params, 0, 0, 0, i, banned=(0,)) for i in range(100)]
        assert 0 not in {result.token for result in sample(logits, batch)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_end_only_their_own_row(bad: float) -> None:
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    results = sample(logits, [SamplingRow(SamplingParams(), i, 0, 0, 0) for i in range(3)])
    assert [result.error is None for result in results] == [True, False, True]
    assert "non-finite" in str(results[1].error)
