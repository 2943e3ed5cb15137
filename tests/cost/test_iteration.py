"""The iteration model: by hand, as closed forms, and against published numbers."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.cost.derived import derive
from nanopd_lab.cost.hardware import load_model
from nanopd_lab.cost.iteration import CapturedSizes, IterationModel, StepFeatures, smooth_max
from nanopd_lab.cost.roofline import ChunkShape, ModelDims, Roof, step_cost
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.model.shapes import shape_config

QWEN = ModelDims.from_config(shape_config("qwen3-8b"), name="qwen3-8b", weight_itemsize=2)
MODEL = IterationModel(
    t0_s=1e-3, weight_s=5e-3, token_s=2e-5, pair_s=1e-9, context_s=5e-8, sequence_s=1e-5, vocab_share=0.1
)
SECONDS = st.floats(0, 1e-2, allow_subnormal=False)
MODELS = st.builds(
    IterationModel,
    t0_s=st.floats(1e-4, 1e-2),
    weight_s=SECONDS,
    token_s=SECONDS,
    pair_s=st.floats(0, 1e-7),
    context_s=st.floats(0, 1e-6),
    sequence_s=SECONDS,
    rows_s=SECONDS,
    host_s=st.floats(0, 0.1),
    vocab_share=st.floats(0, 1),
    sharpness=st.floats(1, 8),
)
RUNS = (st.integers(1, 64), st.integers(1, 100_000))


def test_features_by_hand() -> None:
    step = StepFeatures.of([ChunkShape(1, past=99), ChunkShape(40, past=10), ChunkShape(20, samples=0)])
    assert step == StepFeatures(tokens=61, drawn=2, pairs=99.5 + 40 * 30 + 20 * 10, context=170, sequences=3)


@pytest.mark.parametrize("chunks", [[], [ChunkShape(0, 4)], [ChunkShape(1, -1)]])
def test_features_of_nothing_are_refused(chunks: list[ChunkShape]) -> None:
    with pytest.raises(ValueError, match=r"step is one chunk|no tokens"):
        StepFeatures.of(chunks)


def test_seconds_by_hand() -> None:
    sharp = replace(MODEL, sharpness=1.0)  # the sum
    expected = 1e-3 + (5e-3 * 1.1 + 2e-5 * (101 + 0.1 * 2)) + 1e-9 * (50.5 + 5000) + 5e-8 * 151 + 2e-5
    assert sharp.seconds([ChunkShape(1, 50), ChunkShape(100)]) == pytest.approx(expected, rel=1e-12)
    # In the middle of a prompt nobody draws: the vocabulary projection is neither read nor computed.
    assert sharp.seconds([ChunkShape(10, 0, 0)]) == pytest.approx(
        1e-3 + 5e-3 + 2e-4 + 5e-8 + 5e-7 + 1e-5, rel=1e-12
    )


def test_smooth_max() -> None:
    assert smooth_max(3, 4, 1) == 7
    assert smooth_max(3, 4, 2) == pytest.approx(5)
    assert smooth_max(4, 3, 100) == pytest.approx(4, rel=1e-6)
    assert smooth_max(0, 4, 3) == smooth_max(4, 0, 3) == 4
    assert smooth_max(0, 0, 3) == 0
    assert smooth_max(1e200, 1e-200, 8) == 1e200  # no overflow


def test_graphs_on_or_off_change_only_the_host() -> None:
    eager, graphs = replace(MODEL, host_s=48e-3), MODEL
    short, long = [ChunkShape(1, 500)], [ChunkShape(4096)]
    assert eager.seconds(short) == 48e-3
    assert eager.device_seconds(StepFeatures.of(short)) == graphs.seconds(short) < 48e-3
    assert eager.seconds(long) == graphs.seconds(long) > 48e-3  # max, not sum


@given(MODELS, *RUNS)
def test_a_decode_step_is_a_step(model: IterationModel, batch: int, each: int) -> None:
    assert model.decode_seconds(batch, batch * each) == pytest.approx(
        model.seconds([ChunkShape(1, each)] * batch), rel=1e-9
    )


@settings(max_examples=300)
@given(MODELS, *RUNS, st.integers(0, 200))
def test_a_decode_run_is_the_sum_of_its_steps(
    model: IterationModel, batch: int, context: int, steps: int
) -> None:
    total = sum(model.decode_seconds(batch, context + batch * i) for i in range(steps))
    assert model.decode_run_seconds(batch, context, steps) == pytest.approx(total, rel=1e-9, abs=1e-15)


def test_a_decode_run_over_the_host_corner() -> None:
    # The host is the limit for the first steps only; both sides of the corner are really there.
    model = replace(MODEL, host_s=MODEL.decode_seconds(8, 8 * 500))
    times = [model.decode_seconds(8, 8 * 400 + 8 * i) for i in range(300)]
    assert times[0] == times[90] == model.host_s < times[-1]
    assert model.decode_run_seconds(8, 8 * 400, 300) == pytest.approx(sum(times), rel=1e-12)


@settings(max_examples=300)
@given(MODELS, *RUNS, st.floats(0, 20))
def test_steps_within_is_the_inverse(model: IterationModel, batch: int, context: int, seconds: float) -> None:
    steps = model.decode_steps_within(batch, context, seconds)
    assert steps == 0 or model.decode_run_seconds(batch, context, steps) <= seconds
    assert model.decode_run_seconds(batch, context, steps + 1) > seconds


def test_a_run_of_any_length_is_as_cheap() -> None:
    """A closed form: simulations ask it of every run."""

    def calls(steps: int) -> int:
        count = 0

        def called(*_: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(called)
        try:
            MODEL.decode_run_seconds(32, 10_000, steps)
        finally:
            sys.setprofile(None)
        return count

    calls(50)  # what is worked out once, is
    assert calls(1_000_000) == calls(50) < 60


@pytest.mark.parametrize("change", [{"t0_s": -1e-3}, {"pair_s": math.nan}, {"host_s": math.inf}])
def test_coefficients_are_finite_and_not_negative(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*not negative"):
        replace(MODEL, **change)


def test_sharpness_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sharpness is 0\.5"):
        replace(MODEL, sharpness=0.5)


@pytest.mark.parametrize("chunks", [[ChunkShape(1, 512)], [ChunkShape(1, 512)] * 64, [ChunkShape(4096)]])
def test_the_prior_is_near_the_roofline(chunks: list[ChunkShape]) -> None:
    roof = Roof(3.0e12, 790e12)
    prior = IterationModel.from_roofline(QWEN, 3.0e12, 790e12)
    least = roof.seconds(step_cost(QWEN, chunks))
    # The roofline also counts activations and lets attention hide behind the weights.
    assert 0.95 * least < prior.seconds(chunks) < 1.35 * least


def test_the_prior_by_hand() -> None:
    toy = ModelDims("toy", 2, 4, 8, 2, 1, 2, 10, True, 4, 4)
    prior = IterationModel.from_roofline(toy, 1e3, 1e4, launch_overhead_s=0.5)
    assert prior.weight_s == 288 * 4 / 1e3
    assert prior.token_s == 2 * 288 / 1e4
    assert prior.pair_s == 2 * 2 * 2 * 2 * 2 / 1e4  # layers, heads, head_dim, QK and PV, multiply and add
    assert prior.context_s == 32 / 1e3
    assert (prior.host_s, prior.vocab_share) == (0.5, 40 / 288)
    with pytest.raises(ValueError, match=r"bandwidth 0 B/s"):
        IterationModel.from_roofline(toy, 0, 1e4)


def test_distserve_s_published_fit() -> None:
    model = load_model("a100-opt-13b-distserve").iteration
    prefill = [1e3 * model.seconds([ChunkShape(n)]) for n in (512, 2048)]
    assert prefill == pytest.approx([72.1, 256.7], abs=0.05)
    # Its quadratic term is Σ n²: two prompts do not attend to each other.
    assert 1e3 * model.seconds([ChunkShape(512)] * 2) == pytest.approx(
        18.10 + 0.1019 * 1024 + 7.12e-6 * 2 * 512**2
    )


@pytest.mark.parametrize(("load", "ttft_ms"), [(0.3, 87.6), (0.5, 108.3), (0.7, 156.3), (0.9, 397)])
def test_m_d_1_queue_before_distserve_s_prefill(load: float, ttft_ms: float) -> None:
    # Mean time to first token of Poisson arrivals and equal prompts: D + ρD / 2(1 - ρ).
    service = 1e3 * load_model("a100-opt-13b-distserve").iteration.seconds([ChunkShape(512)])
    assert service + load * service / (2 * (1 - load)) == pytest.approx(ttft_ms, abs=0.5)


def test_derived_numbers() -> None:
    # Two lines exactly as nanoPD's: flat up to the weights' time, then in proportion.
    model = IterationModel(0.0, 16e-3, 1e-3, 0.0, 0.0, 0.0, sharpness=200.0)
    found = derive(model, link=TransferModel(1e-3, 1e-5, 1e9), block_bytes=160_000)
    assert found.alpha_s == pytest.approx(1e-3, rel=1e-3)
    assert found.beta_s == pytest.approx(16e-3)
    assert found.threshold == pytest.approx(16, rel=1e-3)
    assert found.gamma_s == pytest.approx(1e-3, rel=0.01)  # a full batch hides nothing
    assert found.transfer_rate_s == pytest.approx((1e-5 + 160e-6) / 16)
    baseline = found.as_nanopd(10_000)
    assert baseline.transfer_rate_s == pytest.approx(found.transfer_rate_s)
    assert [baseline.decode_seconds(b) for b in (1, 16, 32)] == pytest.approx([16e-3, 16e-3, 32e-3])


def test_what_cannot_be_derived() -> None:
    flat = IterationModel(1e-3, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="no batch threshold"):
        derive(flat)
    with pytest.raises(ValueError, match="without a link"):
        derive(MODEL).as_nanopd(1)
    with pytest.raises(ValueError, match="block_bytes is 0"):
        derive(MODEL, link=TransferModel(0, 0, 1e9))
    for nothing in (0.0, 1e-300):
        with pytest.raises(ValueError, match=r"take no time beside 1\.0 s"):
            IterationModel(nothing, 0, 0, 0, 0, 0).decode_steps_within(1, 1, 1.0)


def test_a_cache_that_costs_next_to_nothing() -> None:
    # The steps until the device overtakes the host are more than a float can hold.
    model = IterationModel(1e-3, 0, 0, 0, 5e-324, 0, host_s=2e-3)
    assert model.decode_run_seconds(1, 1, 10) == pytest.approx(20e-3)
    assert model.decode_steps_within(1, 1, 1.001) == 500


def test_several_rows_take_longer_than_one() -> None:
    """0.02 s, and its share of the vocabulary projection where several are drawn."""
    model = replace(MODEL, rows_s=0.02)

    def longer(*chunks: ChunkShape) -> float:
        return model.seconds(chunks) - MODEL.seconds(chunks)

    assert longer(ChunkShape(1, 50)) == 0
    assert longer(ChunkShape(7, 50, 0)) == pytest.approx(0.02)
    assert longer(ChunkShape(7, 50), ChunkShape(5, 0, 0)) == pytest.approx(0.02)
    assert longer(ChunkShape(1, 50), ChunkShape(1, 60)) == pytest.approx(0.02 * (1 + MODEL.vocab_share))


@given(MODELS, st.floats(0.1, 10.0), st.integers(1, 50), st.integers(0, 10_000))
def test_a_slower_device_takes_longer_for_every_step(
    model: IterationModel, factor: float, batch: int, context: int
) -> None:
    slower = model.scaled(factor)
    chunks = [ChunkShape(1, context)] * batch + [ChunkShape(40, context)]
    assert slower.seconds(chunks) == pytest.approx(factor * model.seconds(chunks))
    run = slower.decode_run_seconds(batch, context, 7)
    assert run == pytest.approx(factor * model.decode_run_seconds(batch, context, 7))


def test_captured_steps_are_padded() -> None:
    sizes = CapturedSizes(batches=(1, 4, 8), tokens=(16, 64))
    assert sizes.rows(3, 3, 3) == (4, 4)  # a decode step; every row of its graph is projected
    assert sizes.rows(8, 8, 8) == (8, 8)
    assert sizes.rows(9, 9, 9) == (16, 9)  # too many for those
    assert sizes.rows(17, 2, 3) == (64, 2)
    assert sizes.rows(65, 2, 3) == (65, 2)  # launched
    assert CapturedSizes().rows(17, 2, 3) == (17, 2)
    for wrong in ((0, 1), (4, 4), (8, 4)):
        with pytest.raises(ValueError, match="positive and ascending"):
            CapturedSizes(batches=wrong)
    model = replace(MODEL, captured=sizes)
    assert model.seconds([ChunkShape(17, 5)]) == pytest.approx(
        MODEL.seconds([ChunkShape(17, 5)]) - MODEL._matrices(17, 1) + MODEL._matrices(64, 1)
    )
    # The closed forms pad too.
    for batch in (1, 3, 8, 9, 70):
        step = model.seconds([ChunkShape(1, 10)] * batch)
        assert model.decode_seconds(batch, 10 * batch) == pytest.approx(step)
        assert model.decode_run_seconds(batch, 10 * batch, 1) == pytest.approx(step)
