"""Which transport is chosen for workers on several machines, and what is said of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.transfer.base import TransferError
from nanopd_lab.transfer.nixl_agent import is_installed
from nanopd_lab.transfer.offers import Offer, choose_between, host_identity, listen_on, own_offer
from nanopd_lab.transfer.registry import check_transport

BOTH = ("torchdist", "nixl")


@pytest.mark.parametrize(
    ("offers", "name", "reason"),
    [
        ([("a/1", BOTH), ("a/1", BOTH)], "shm", "shared memory"),
        ([("a/1", BOTH), ("b/1", BOTH)], "nixl", "nixl on each"),
        ([("a/1", BOTH), ("a/2", BOTH)], "nixl", "2 machines"),  # of one name
        ([("a/1", BOTH), ("b/1", BOTH[:1])], "torchdist", r"w1 on b lacks nixl.*pip install"),
        ([("a/1", ("torchdist",)), ("b/1", BOTH[:1])], "torchdist", r"w0 on a and 1 other lack nixl"),
        ([("a/1", BOTH), ("b/1", BOTH), ("b/1", BOTH)], "auto+nixl", r"of one machine \(b\).*shared memory"),
        ([("a/1", BOTH), ("b/1", BOTH), ("b/1", BOTH[:1])], "auto+torchdist", "w2 on b lacks nixl"),
    ],
)
def test_choice(offers: list, name: str, reason: str) -> None:
    choice = choose_between([Offer(f"w{i}", host, "cpu", has) for i, (host, has) in enumerate(offers)])
    assert choice.name == name
    assert re.search(reason, choice.reason)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sets(st.sampled_from(BOTH), min_size=1)), min_size=2, max_size=6
    )
)
def test_what_is_chosen_is_had_by_all(given_offers: list) -> None:
    offers = [Offer(f"w{i}", host, "cpu", tuple(has)) for i, (host, has) in enumerate(given_offers)]
    hosts = [offer.host for offer in offers]
    common = set(BOTH).intersection(*(offer.transports for offer in offers))
    if len(set(hosts)) == 1:
        assert choose_between(offers).name == "shm"
    elif not common:
        with pytest.raises(TransferError, match="install the same everywhere"):
            choose_between(offers)
    else:
        name = choose_between(offers).name
        assert name.rpartition("+")[2] == ("nixl" if "nixl" in common else "torchdist")
        assert ("+" in name) == (len(set(hosts)) < len(hosts))
        check_transport(listen_on(name, "10.0.0.1"), [torch.device("cpu")])


def test_what_cannot_be_joined() -> None:
    with pytest.raises(TransferError, match="no transport joins workers on cpu and cuda"):
        choose_between([Offer("w0", "a", "cpu", BOTH), Offer("w1", "b", "cuda:0", BOTH)])
    for name in ("nixl+shm", "shm+pigeon", "torchdist+nixl"):
        with pytest.raises(TransferError, match=r"in front of the \+ stands one inside a machine"):
            check_transport(name, [torch.device("cpu")])


def test_own_offer() -> None:
    offer = own_offer("w0", "cpu")
    assert (offer.worker, offer.host, offer.device) == ("w0", host_identity(), "cpu")
    assert "torchdist" in offer.transports
    assert ("nixl" in offer.transports) == is_installed()
    other = subprocess.run(
        [sys.executable, "-c", "from nanopd_lab.transfer.offers import host_identity; print(host_identity())"],
        capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert other.stdout.strip() == offer.host


@pytest.mark.skipif(not is_installed(), reason="needs nixl")
def test_nixl_is_offered_where_it_starts() -> None:
    assert own_offer("w0", "cpu", "127.0.0.1") == own_offer("w0", "cpu")
    environment = {**os.environ, "UCX_TLS": "self"}  # UCX then has nothing that leads to others
    code = "from nanopd_lab.transfer.offers import own_offer; print(own_offer('w0', 'cpu', '127.0.0.1'))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "transports=('torchdist',)" in other.stdout, other.stdout + other.stderr
    assert "NIXL's agent does not start" in other.stdout


def test_an_address_is_added_where_one_is_listened_on() -> None:
    assert [listen_on(name, "10.0.0.1") for name in ("shm", "nixl", "auto+torchdist")] == [
        "shm",
        "nixl:10.0.0.1",
        "auto+torchdist:10.0.0.1",
    ]
