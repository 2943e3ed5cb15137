"""`Positions` against a set."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.cluster.positions import Positions, compact

PLACES = st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True).map(sorted)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 4), st.lists(PLACES, max_size=6))
def test_it_is_a_set_that_knows_its_beginning(first: int, added: list[list[int]]) -> None:
    found, wanted = Positions(first), set(range(first))
    for places in added:
        assert list(compact(places)) == places
        assert isinstance(compact(places), range) == (places[-1] - places[0] == len(places) - 1)
        found.add(compact(places))
        wanted |= set(places)
        assert set(found) == wanted
        assert len(found) == len(wanted)
        assert [place in found for place in range(14)] == [place in wanted for place in range(14)]
        assert found.first == min(place for place in range(14) if place not in wanted)
