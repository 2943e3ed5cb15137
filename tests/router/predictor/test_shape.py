"""The shape: a Dirichlet process when all is seen, and right when much of it is cut off."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.router.predictor.shape import EDGES, Shape, between

SHARES = st.lists(st.floats(0, 1, exclude_max=True), max_size=60)


@given(SHARES, st.floats(0.5, 200))
def test_without_cuts_it_is_counts_and_the_belief_worth_so_many(shares: list[float], strength: float) -> None:
    shape = Shape(strength)
    for each in shares:
        shape.add(each)
    below = [sum(each < edge for each in shares) for edge in EDGES]
    exact = [
        (strength * edge + count) / (strength + len(shares)) for edge, count in zip(EDGES, below, strict=True)
    ]
    assert shape.table() == pytest.approx(exact, abs=1e-9)


@given(SHARES, SHARES, st.floats(0, 1, exclude_max=True))
def test_a_cut_off_truth_raises_what_lies_above(ended: list[float], cut: list[float], one: float) -> None:
    shape = Shape(10.0)
    for each in ended:
        shape.add(each)
    for each in cut:
        shape.add(each, censored=True)
    before = shape.table()
    assert before == sorted(before)
    assert before[0] == 0
    assert before[-1] == 1
    shape.add(one, censored=True)
    assert all(after >= earlier - 1e-12 for after, earlier in zip(shape.table(), before, strict=True))


def test_half_of_all_cut_off_at_random_leaves_it_right() -> None:
    """Truths have the share `u**2`, so that sqrt(edge) lies below; each is cut at a share drawn by itself."""
    rng, shape, naive = random.Random(2), Shape(5.0), Shape(5.0)
    for _ in range(20_000):
        truth, bound = rng.random() ** 2, rng.random() ** 2
        shape.add(max(truth, bound), censored=bound > truth)
        naive.add(max(truth, bound))
    # Small shares, long lengths, are seldom seen: half the truths are cut off before.
    places = np.array(EDGES) >= 0.01
    assert np.array(shape.table())[places] == pytest.approx(np.sqrt(EDGES)[places], abs=0.02)
    assert max(np.abs(np.array(naive.table()) - np.sqrt(EDGES))) > 0.2


@given(SHARES, SHARES)
def test_what_is_running_is_cut_off_for_now(ended: list[float], running: list[float]) -> None:
    told, asked = Shape(10.0), Shape(10.0)
    for each in ended:
        told.add(each)
        asked.add(each)
    before = asked.table()
    for each in running:
        told.add(each, censored=True)
    assert asked.table(running=running) == pytest.approx(told.table(), abs=1e-9)
    assert asked.table() == before


def test_looking_up_one_number_is_what_numpy_does() -> None:
    table = [edge**2 for edge in EDGES]
    for x in (0.0, 1e-9, 0.03, 0.5, 0.9995, 1.0):
        assert between(x, EDGES, table) == pytest.approx(np.interp(x, EDGES, table), abs=1e-15)
