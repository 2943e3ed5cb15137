"""Hazard ratios of outputs that came lately: exact where lengths are as ever, and what they do to a mean."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.router.survival import corrected, hazard_ratio

LENGTHS = st.lists(st.integers(1, 2000), min_size=1, max_size=100)


@given(st.integers(1, 500), st.integers(1, 60), st.lists(st.floats(0, 1), max_size=60))
def test_outputs_of_one_length_change_nothing(length: int, count: int, parts: list[float]) -> None:
    """Nobody was expected to end before, and everybody did then."""
    ages = [part * (length - 0.5) for part in parts]
    assert hazard_ratio([length] * count, [length] * 7, ages) == pytest.approx(1.0)
    assert corrected(length, [length] * count, [length] * 7, ages) == pytest.approx(length)


@given(LENGTHS)
def test_who_ended_as_the_others_did_was_expected_to(ends: list[int]) -> None:
    """The expected number of ends of a sample under its own hazard is its size (Aalen); looked at up to 2, about."""
    assert hazard_ratio(ends, ends, []) == pytest.approx(1.0, abs=0.2)


@given(LENGTHS, st.lists(st.integers(1, 2000), max_size=50), st.lists(st.floats(0, 5000), max_size=50))
def test_who_goes_on_longer_makes_the_mean_longer(
    ends: list[int], ended: list[int], ages: list[float]
) -> None:
    here = corrected(100.0, ends, ended, ages)
    assert here > 0
    assert corrected(100.0, ends, ended, [2 * age for age in ages]) >= here - 1e-9
    assert corrected(100.0, ends, ended, [*ages, 10_000.0]) >= here


def test_before_anything_has_ended_nothing_is_known() -> None:
    assert corrected(123.0, [], [], [5.0, 900.0]) == 123.0


@pytest.mark.parametrize(("before", "after"), [(40, 400), (400, 40)])
def test_lengths_that_shift_are_seen_before_they_have_ended(before: int, after: int) -> None:
    """30 a second at 70 tokens a second each; from 8 s on the others come, and at 12 s few of them can have ended."""
    rng = random.Random(0)
    jobs = [(n / 30, (before if n < 240 else after) * rng.lognormvariate(0, 0.4)) for n in range(360)]
    ends = [round(tokens) for begun, tokens in jobs if begun + tokens / 70 < 12][-128:]
    lately = jobs[-96:]
    ended = [round(tokens) for begun, tokens in lately if begun + tokens / 70 < 12]
    going = [70 * (12 - begun) for begun, tokens in lately if begun + tokens / 70 >= 12]
    plain = sum(ends) / len(ends)
    true = sum(tokens for _, tokens in lately) / len(lately)
    assert abs(corrected(plain, ends, ended, going) - true) < 0.7 * abs(plain - true)
