"""Links that pulls share: max-min fair by another way of finding it, nothing lost, times by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.links import Flow, LinkModel
from nanopd_lab.sim.network import Network, Port, Topology, max_min

CAPACITIES = {"a": 12, "b": 6, "c": 20, "d": 3}
PATHS = st.lists(
    st.lists(st.sampled_from(sorted(CAPACITIES)), min_size=1, max_size=3, unique=True), min_size=1, max_size=6
)
SMALL = Topology(2, 2, nvlink_bytes_per_s=80.0, nic_bytes_per_s=20.0, oversubscription=4.0)


def filled(paths: list[list[str]]) -> list[Fraction]:
    """Water rises for all alike, as far as it can; who is on a full link stops. In fractions, and link by link."""
    rates = [Fraction(0)] * len(paths)
    rising = set(range(len(paths)))
    while rising:
        spare = {
            link: Fraction(size)
            - sum((rates[n] for n, path in enumerate(paths) if link in path), Fraction(0))
            for link, size in CAPACITIES.items()
        }
        growing = {link: sum(link in paths[n] for n in rising) for link in CAPACITIES}
        step = min(spare[link] / count for link, count in growing.items() if count)
        for n in rising:
            rates[n] += step
        full = {link for link, count in growing.items() if count and spare[link] == step * count}
        rising = {n for n in rising if not full & set(paths[n])}
    return rates


@given(PATHS)
def test_rates_are_those_of_rising_water(paths: list[list[str]]) -> None:
    found = max_min(dict(enumerate(paths)), CAPACITIES.__getitem__)
    assert [found[n] for n in range(len(paths))] == pytest.approx([float(rate) for rate in filled(paths)])


@given(PATHS)
def test_nobody_can_have_more_without_taking_it_from_one_who_has_no_more(paths: list[list[str]]) -> None:
    """The definition: each goes through a full link on which nobody is faster; and no link carries too much."""
    rates = max_min(dict(enumerate(paths)), CAPACITIES.__getitem__)
    carried = {link: sum(rates[n] for n, path in enumerate(paths) if link in path) for link in CAPACITIES}
    for link, size in CAPACITIES.items():
        assert carried[link] <= size * (1 + 1e-9)
    for n, path in enumerate(paths):
        assert any(
            carried[link] == pytest.approx(CAPACITIES[link])
            and all(rates[n] >= rates[m] - 1e-9 for m, other in enumerate(paths) if link in other)
            for link in path
        )


class Recorder:
    """Starts pulls of a network at their times and writes down when each ends."""

    def __init__(self, topology: Topology, model: LinkModel | None = None) -> None:
        self.queue, self.ends = EventQueue(), dict[object, float]()
        self.network = Network(topology, self.queue)
        ended = lambda flow: self.ends.update({flow.payload: self.queue.now})  # noqa: E731
        self.port = Port(model or LinkModel(), self.queue, ended, self.network, 0)

    def at(self, time: float, source: int, target: int, size: int, name: object) -> None:
        start = lambda _: self.port.start(f"w{source}", f"w{target}", 1, size, name) and None  # noqa: E731
        self.queue.push(time, Kind.ARRIVAL, start)

    def run(self) -> None:
        for _ in self.queue.run():
            for link, flows in self.network.users.items():
                used = sum(flow.rate for flow in flows)
                assert used <= self.network.topology.capacity(link) * (1 + 1e-9)
                assert len(flows) > 0


def test_paths_by_hand() -> None:
    assert SMALL.path(0, 1) == (("gpu-out", 0), ("gpu-in", 1))
    assert SMALL.path(0, 2) == (("nic-out", 0), ("nic-in", 1))
    assert SMALL.path(5, 0) == (("nic-out", 2), ("nic-in", 0), ("up", 1), ("down", 0))
    assert SMALL.capacity(("up", 0)) == 2 * 20 / 4
    with pytest.raises(ValueError, match="oversubscription is 0"):
        Topology(oversubscription=0)


def test_times_by_hand() -> None:
    """Two pulls leave node 0 for another rack through 10 B/s of uplink; a third stays in the rack and gets what they
    leave of the NIC: 20 - 2 * 5. Who is in the node is not held up."""
    found = Recorder(SMALL, LinkModel(setup_s=1.0))
    found.at(0.0, 0, 4, 50, "far")
    found.at(0.0, 1, 6, 50, "far too")
    found.at(0.0, 0, 2, 50, "near")
    found.at(0.0, 1, 0, 80, "inside")
    found.at(9.0, 0, 4, 50, "later")
    found.run()
    # At 10 s both have 5 bytes left, and three share the uplink for 1.5 s.
    assert found.ends == pytest.approx(
        {"inside": 2.0, "near": 6.0, "far": 11.5, "far too": 11.5, "later": 16.0}
    )
    assert found.network.sent_bytes == {
        "nic-out": 200.0, "nic-in": 200.0, "up": 150.0, "down": 150.0, "gpu-out": 80.0, "gpu-in": 80.0,
    }  # fmt: skip
    assert not found.network.users
    assert not found.network.paths


PULLS = st.lists(
    st.tuples(
        st.integers(0, 20), st.integers(0, 7), st.integers(0, 7), st.integers(1, 100), st.integers(0, 30)
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None)
@given(PULLS)
def test_every_byte_arrives_no_sooner_than_it_can_and_nobody_is_forgotten(
    pulls: list[tuple[int, int, int, int, int]],
) -> None:
    """The rates while a pull is under way add up to its bytes; rates change only with who is there; some are cancelled.
    The rates are those of all pulls taken together, though only those near a change are looked at."""
    found = Recorder(SMALL)
    sent: dict[Flow, float] = {}
    cancelled = set()
    flows: list[Flow] = []
    for n, (time, source, target, size, gives_up) in enumerate(pulls):
        other = target if target != source else (target + 1) % 8

        def start(_: int, n: int = n, source: int = source, other: int = other, size: int = size) -> None:
            flows.append(found.port.start(f"w{source}", f"w{other}", 1, size, n))

        def give_up(_: int, n: int = n) -> None:
            for flow in [flow for flow in found.port.flows if flow.payload == n]:
                found.port.end(flow)
                cancelled.add(n)

        found.queue.push(float(time), Kind.ARRIVAL, start)
        if gives_up < 5:
            found.queue.push(float(time + gives_up), Kind.FAULT, give_up)
    before = 0.0
    rates: dict[Flow, float] = {}
    for now in found.queue.run():
        for flow, rate in rates.items():
            sent[flow] = sent.get(flow, 0.0) + rate * (now - before)
        before, rates = now, {flow: flow.rate for flow in found.network.paths}
        whole = max_min(found.network.paths, SMALL.capacity)
        assert rates == pytest.approx(whole)
    assert len(flows) == len(pulls)
    for flow in flows:
        n = flow.payload
        assert isinstance(n, int)
        assert (n in found.ends) != (n in cancelled)
        if n in found.ends:
            assert sent[flow] == pytest.approx(pulls[n][3])
            assert found.ends[n] - pulls[n][0] >= pulls[n][3] / 80.0 - 1e-9
    assert not found.port.flows
    assert not found.network.ports


def test_a_fleet_shares_what_a_link_has() -> None:
    """All pulls from one rack into another at once: each gets its part of the uplink, whoever they are."""
    found = Recorder(SMALL)
    for n, (source, target) in enumerate(itertools.product(range(4), range(4, 8))):
        found.at(0.0, source, target, 10, n)
    found.run()
    assert {round(end, 9) for end in found.ends.values()} == {16.0}
    assert math.isclose(found.network.sent_bytes["up"], 160.0)
