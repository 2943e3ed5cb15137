"""The baseline reproduces what nanoPD published."""

from __future__ import annotations

import pytest

from nanopd_lab.cost.grid import grid_for
from nanopd_lab.cost.nanopd import NanoPDModel, published
from nanopd_lab.cost.roofline import ChunkShape


@pytest.mark.parametrize(("device", "ratio"), [("rtx-4090", 7.6), ("h20", 346)])
def test_interference_against_transfer(device: str, ratio: float) -> None:
    assert published(device).gamma_over_transfer_rate == pytest.approx(ratio, rel=0.005)


def test_the_published_table() -> None:
    model = published("rtx-4090")
    times = [round(1e3 * model.collocated_seconds(512, 200, load)) for load in (0, 4, 16, 32)]
    assert times == [10376, 10387, 10420, 20732]
    assert round(1e3 * model.disaggregated_seconds(512, 200)) == 10382


@pytest.mark.parametrize(("device", "first"), [("rtx-4090", 3), ("h20", 1)])
@pytest.mark.parametrize("prompt", [64, 512, 4096])
def test_from_which_load_on_disaggregated_wins(device: str, first: int, prompt: int) -> None:
    # Both sides are linear in the prompt up to the threshold: the crossover does not depend on it.
    wins = [load for load in range(33) if published(device).prefers_disaggregated(prompt, 200, load)]
    assert wins == list(range(first, 33))


def test_up_to_the_threshold_the_two_differ_by_less_than_the_noise() -> None:
    model = published("rtx-4090")
    other = model.disaggregated_seconds(512, 200)
    assert all(abs(model.collocated_seconds(512, 200, b) / other - 1) < 0.004 for b in range(17))


def test_ties_are_collocated_and_a_full_decode_worker_repels() -> None:
    free = NanoPDModel(1e-4, 1e-2, 16, 0.0, 1e300)
    assert not free.prefers_disaggregated(512, 200, 4)
    assert not published("h20").prefers_disaggregated(512, 200, 4, decode_batch=31)


def test_the_new_sequence_counts_in_the_decode_batch_where_it_moves_to() -> None:
    model = NanoPDModel(1e-4, 1e-2, 16, 0.0, 1e300)
    assert model.disaggregated_seconds(1, 100, decode_batch=31) == pytest.approx(1e-4 + 100 * 2e-2)
    assert model.collocated_seconds(1, 100, load=32) == pytest.approx(1e-4 + 100 * 2e-2)


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="bytes_per_s is 0"):
        NanoPDModel(1e-4, 1e-2, 16, 1e-4, 0)
    with pytest.raises(ValueError, match="'a100'; it did for rtx-4090, h20"):
        published("a100")


def test_its_own_steps_give_its_parameters_back() -> None:
    planted = NanoPDModel(2e-4, 3e-2, 8, 0.0, float("inf"))
    points = grid_for("cuda", True).points(10_000, 100_000, 100_000, 16)
    found = NanoPDModel.fit([(point, planted.step_seconds(point.chunks)) for point in points])
    assert (found.alpha_s, found.beta_s) == pytest.approx((2e-4, 3e-2))
    assert found.threshold == 8
    assert found.step_seconds([ChunkShape(100), *[ChunkShape(1, 50)] * 16]) == pytest.approx(0.02 + 0.06)
    assert found.step_seconds([ChunkShape(1, 0)]) == pytest.approx(2e-4)  # a prompt of one token
    with pytest.raises(ValueError, match="0 decode steps; both are needed"):
        NanoPDModel.fit([(point, 1.0) for point in points if point.kind == "prefill"])
