"""Planted coefficients come back, none is ever negative, and held-out steps are met."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.cost.fitting import (
    TERMS,
    FitError,
    StepSample,
    errors,
    fit_iteration,
    fit_terms,
    fit_without,
    held_out_error,
    launch_overhead,
)
from nanopd_lab.cost.iteration import COEFFICIENTS, IterationModel, StepFeatures
from nanopd_lab.cost.roofline import ChunkShape
from nanopd_lab.cost.transfer_time import TransferModel, TransferSample

PLANTED = IterationModel(
    t0_s=4e-3,
    weight_s=20e-3,
    token_s=2.5e-3,
    pair_s=6e-7,
    context_s=8e-6,
    sequence_s=6e-4,
    vocab_share=0.27,
    sharpness=2.0,
)


def steps(seed: int, count: int) -> list[StepFeatures]:
    """Prefill, decode and mixed batches of random sizes."""
    rng, found = random.Random(seed), []
    for number in range(count):
        chunks = []
        if number % 3 != 1:
            chunks.append(ChunkShape(rng.randint(8, 512), rng.choice([0, 200, 1500]), rng.randint(0, 1)))
        if number % 3 != 0:
            chunks += [ChunkShape(1, rng.randint(16, 1500)) for _ in range(rng.choice([1, 2, 4, 8, 16, 32]))]
        found.append(StepFeatures.of(chunks))
    return found


def timed(
    model: IterationModel, noise: float, seed: int = 0, count: int = 90, scale: float = 1.0
) -> list[StepSample]:
    rng = np.random.default_rng(seed)
    return [
        StepSample(s, scale * model.of_features(s) * float(np.exp(noise * rng.standard_normal())))
        for s in steps(seed, count)
    ]


def test_planted_coefficients_come_back() -> None:
    found = fit_iteration(timed(PLANTED, 0.01), vocab_share=0.27, host_s=0.0)
    assert found.token_s == pytest.approx(PLANTED.token_s, rel=0.03)
    assert found.pair_s == pytest.approx(PLANTED.pair_s, rel=0.1)
    assert found.context_s == pytest.approx(PLANTED.context_s, rel=0.1)
    assert found.sequence_s == pytest.approx(PLANTED.sequence_s, rel=0.3)
    # Apart only through the corner's shape, so their sum is what is known well.
    assert found.t0_s + found.weight_s == pytest.approx(PLANTED.t0_s + PLANTED.weight_s, rel=0.15)


def test_what_several_rows_take_longer_is_found_on_a_cpu() -> None:
    """And it isn't looked for on a GPU, nor found where there is none."""
    planted = replace(PLANTED, t0_s=0.0, sharpness=1.0, rows_s=15e-3)
    samples = timed(planted, 0.01)
    found = fit_iteration(samples, vocab_share=0.27, host_s=0.0)
    assert found.rows_s == pytest.approx(15e-3, rel=0.1)
    assert found.weight_s == pytest.approx(20e-3, rel=0.1)
    assert fit_iteration(samples, vocab_share=0.27).rows_s == 0
    without = fit_iteration(timed(replace(planted, rows_s=0.0), 0.01), vocab_share=0.27, host_s=0.0)
    assert without.rows_s < 1e-3
    thinner = fit_without(found, samples, None)
    assert thinner.rows_s == pytest.approx(found.rows_s, rel=0.01)


def test_without_noise_the_fit_is_exact() -> None:
    samples = timed(PLANTED, 0.0)
    assert errors(fit_iteration(samples, vocab_share=0.27, host_s=0.0), samples).maximum < 0.01


def test_held_out_steps_are_met() -> None:
    found = fit_iteration(timed(PLANTED, 0.03), vocab_share=0.27, host_s=0.0)
    held_out = errors(found, timed(PLANTED, 0.0, seed=1, count=40))
    assert held_out.count == 40
    assert held_out.mean < 0.015
    assert held_out.maximum < 0.06


@settings(deadline=None, max_examples=4)
@given(st.integers(0, 10_000))
def test_never_negative_even_on_nonsense(seed: int) -> None:
    rng = random.Random(seed)
    samples = [StepSample(s, rng.uniform(1e-3, 1.0)) for s in steps(seed, 20)]
    found = fit_iteration(samples, host_s=0.0)
    assert min(getattr(found, name) for name in COEFFICIENTS) >= 0


# Device times as on an H100, and a host that takes longer than every decode step.
GRAPHS = IterationModel(
    t0_s=1e-4, weight_s=5e-3, token_s=2e-5, pair_s=1e-9, context_s=5e-8, sequence_s=1e-5, vocab_share=0.27
)
EAGER = replace(GRAPHS, host_s=11e-3)


def long_steps(model: IterationModel, noise: float, seed: int) -> list[StepSample]:
    """Prompt chunks that no host can hide."""
    rng = np.random.default_rng(seed)
    found = [
        StepFeatures.of([ChunkShape(int(n), int(past)), *[ChunkShape(1, 800)] * int(batch)])
        for n, past, batch in zip(
            rng.integers(600, 8000, 40), rng.integers(0, 4000, 40), rng.integers(0, 64, 40), strict=True
        )
    ]
    return [StepSample(s, model.of_features(s) * float(np.exp(noise * rng.standard_normal()))) for s in found]


def test_launch_overhead_is_found() -> None:
    samples = [*timed(EAGER, 0.01), *long_steps(EAGER, 0.01, 0)]
    assert sum(GRAPHS.of_features(s.step) < 11e-3 for s in samples) > 60  # most are hidden under the host
    found = fit_iteration(samples, vocab_share=0.27)
    assert found.host_s == pytest.approx(11e-3, rel=0.03)
    assert errors(found, [*timed(EAGER, 0.0, seed=2), *long_steps(EAGER, 0.0, 2)]).mean < 0.02
    # Where the device is the limit its share is the device's, not the host's passed on to t0.
    assert found.token_s == pytest.approx(GRAPHS.token_s, rel=0.02)
    assert found.device_seconds(StepFeatures.of([ChunkShape(1, 500)])) < 9e-3


def test_no_launch_overhead_is_found_where_there_is_none() -> None:
    samples = [*timed(GRAPHS, 0.0), *long_steps(GRAPHS, 0.0, 0)]
    assert fit_iteration(samples, vocab_share=0.27).host_s < 5.5e-3


def test_graphs_off_changes_only_the_host() -> None:
    device = fit_iteration([*timed(GRAPHS, 0.01), *long_steps(GRAPHS, 0.01, 0)], vocab_share=0.27)
    eager = launch_overhead(device, timed(EAGER, 0.01, seed=3))
    assert eager.host_s == pytest.approx(11e-3, rel=0.02)
    assert replace(eager, host_s=device.host_s) == device
    assert errors(eager, timed(EAGER, 0.0, seed=4)).mean < 0.02
    with pytest.raises(ValueError, match="no steps"):
        launch_overhead(device, [])


def test_a_host_that_hides_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only 0 of 90 steps take longer than the host's 9\.0 s"):
        fit_iteration(timed(GRAPHS, 0.0), host_s=9.0)


def test_errors() -> None:
    step = steps(0, 1)[0]
    exact = PLANTED.of_features(step)
    found = errors(PLANTED, [StepSample(step, exact), StepSample(step, exact / 1.1)])
    assert found.mean == pytest.approx(0.05)
    assert found.maximum == pytest.approx(0.1)
    assert str(FitError(2, 0.05, 0.1)) == "mean 5.0%, max 10.0% over 2 steps"
    with pytest.raises(ValueError, match="no steps"):
        errors(PLANTED, [])


def test_too_little_to_fit() -> None:
    with pytest.raises(ValueError, match="at least 8 timed steps, got 3"):
        fit_iteration(timed(PLANTED, 0.0, count=3))
    for scale in (0.0, math.inf):
        with pytest.raises(ValueError, match=r"a step took (0\.0|inf) s; times are positive and finite"):
            fit_iteration(timed(PLANTED, 0.0, scale=scale))


def test_transfer_model_comes_back() -> None:
    planted = TransferModel(2e-4, 3e-6, 12e9)
    sizes = [(b, b * size) for b in (1, 16, 128, 1024) for size in (20_000, 2_359_296)]
    rng = np.random.default_rng(0)
    noisy = [TransferSample(b, n, planted.seconds(b, n) * float(rng.normal(1, 0.01))) for b, n in sizes]
    found = TransferModel.fit(noisy)
    assert found.setup_s == pytest.approx(2e-4, rel=0.1)
    assert found.block_s == pytest.approx(3e-6, rel=0.15)
    assert found.bytes_per_s == pytest.approx(12e9, rel=0.03)
    assert planted.seconds(0, 0) == 0


def test_transfer_blocks_of_one_size() -> None:
    planted = TransferModel(1e-3, 1e-5, 10e9)
    one_size = [TransferSample(b, b * 2**21, planted.seconds(b, b * 2**21)) for b in (1, 8, 64, 512)]
    found = TransferModel.fit(one_size)
    assert found.block_s == 0
    assert found.setup_s == pytest.approx(1e-3, rel=1e-6)
    assert found.seconds(100, 100 * 2**21) == pytest.approx(planted.seconds(100, 100 * 2**21), rel=1e-6)
    with pytest.raises(ValueError, match="two timed pulls"):
        TransferModel.fit(one_size[:1])
    with pytest.raises(ValueError, match="bytes_per_s is 0"):
        TransferModel(0, 0, 0)


def test_what_was_fitted_is_left_out_of_the_held_out_error() -> None:
    samples = timed(PLANTED, 0.1, count=20)
    again = [replace(s, seconds=2 * s.seconds) for s in samples[:15]]
    assert held_out_error(PLANTED, samples, again) == errors(PLANTED, samples[15:])
    with pytest.raises(ValueError, match="no steps"):
        held_out_error(PLANTED, samples, samples)


def test_the_fit_of_terms_is_relative_and_not_negative() -> None:
    alone = fit_terms(np.ones((2, 1)), np.array([0.01, 0.1]))
    assert alone == pytest.approx([(1 / 0.01 + 1 / 0.1) / (1 / 0.01**2 + 1 / 0.1**2)])
    falling = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert fit_terms(falling, np.array([3.0, 2.0, 1.0]))[1] == 0
    assert fit_terms(np.array([[2.0, 0.0], [4.0, 0.0]]), np.array([1.0, 2.0])) == pytest.approx([0.5, 0])


def test_another_solver_is_asked() -> None:
    asked = []

    def solve(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        asked.append(terms.shape)
        return fit_terms(terms, seconds)

    samples = timed(PLANTED, 0.01)
    assert fit_iteration(samples, host_s=0.0, solve=solve) == fit_iteration(samples, host_s=0.0)
    assert {rows for rows, _ in asked} == {len(samples)}
    assert {columns for _, columns in asked} == {
        4,
        5,
        6,
    }  # without and with a constant, and what several rows take


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_worth_something(term: str) -> None:
    samples = timed(PLANTED, 0.0)
    whole, thinner = fit_without(PLANTED, samples, None), fit_without(PLANTED, samples, term)
    assert errors(whole, samples).maximum < 1e-6
    assert errors(thinner, samples).mean > 0.001
    name = dict(zip(TERMS, ("weight_s", "token_s", "t0_s", "pair_s", "context_s", "sequence_s"), strict=True))
    assert getattr(thinner, name[term]) == 0
    with pytest.raises(ValueError, match="unknown term 'love'"):
        fit_without(PLANTED, samples, "love")
