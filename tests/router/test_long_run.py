"""The long run: rates over many arrivals, and queues that grow for ever, held against a queue served step by step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.router.long_run import LongRun, lasting


def in_time(load: float, room_s: float, going_s: float, mean_s: float) -> float:
    """Of prompts that come every `mean_s` and take `load` times as long: the share of those that are served, where
    nobody waits for longer than `room_s`."""
    count, free_at, served = max(1, round(going_s / mean_s)), 0.0, 0
    for number in range(count):
        now = number * mean_s
        if free_at - now <= room_s:
            free_at = max(free_at, now) + load * mean_s
            served += 1
    return served / count


@given(st.floats(0.2, 6.0), st.floats(0.5, 5.0), st.floats(0.1, 50.0))
def test_a_queue_that_grows_loses_what_it_has_no_time_for(load: float, room_s: float, going_s: float) -> None:
    expected = in_time(load, room_s, going_s, min(going_s, room_s) / 1000)
    assert lasting(load, room_s, going_s) == pytest.approx(expected, abs=0.01)


def test_without_an_end_only_the_rates_count() -> None:
    assert lasting(2.0, 5.0, math.inf) == 0.5
    assert lasting(1.0, 0.0, math.inf) == 1.0


def test_without_an_objective_nobody_is_late() -> None:
    assert lasting(3.0, math.inf, 1e6) == 1.0


def test_a_rate_is_that_of_many_arrivals() -> None:
    """2,000 prompts of 100 tokens at 10 a second, and 40 at ten times the rate: a twelfth of the memory."""
    found, now = LongRun(500), 0.0
    assert found.tokens_per_s == 0.0
    for _ in range(2000):
        found.arrived(now, 100)
        now += 0.1
    assert found.tokens_per_s == pytest.approx(1000.0)
    for _ in range(40):
        found.arrived(now, 100)
        now += 0.01
    assert 1000.0 < found.tokens_per_s < 1100.0


def test_what_was_before_can_be_forgotten() -> None:
    found = LongRun(500)
    for number in range(1000):
        found.arrived(0.1 * number, 100)
    found.begin_again(3200, 0.064)
    assert found.tokens_per_s == 50_000.0
    for number in range(32):
        found.arrived(99.9 + 0.002 * (number + 1), 100)
    assert abs(found.tokens_per_s - 50_000.0) < 1.0
