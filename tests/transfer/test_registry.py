"""Which transport is chosen for which workers."""

from __future__ import annotations

import pytest
import torch

from nanopd_lab.transfer.base import TransferError
from nanopd_lab.transfer.inproc import InprocTransport
from nanopd_lab.transfer.nixl_agent import is_installed
from nanopd_lab.transfer.pinned import PinnedTransport, runs
from nanopd_lab.transfer.registry import TRANSPORTS, choose_transport, create_transport
from nanopd_lab.transfer.shm import ShmTransport


@pytest.mark.parametrize(
    ("devices", "one_process", "peers", "name", "reason"),
    [
        (["cpu"] * 2, False, (), "shm", "shared memory"),
        (["cpu"] * 2, True, (), "inproc", "in this process"),
        (["cuda:1", "cuda:1"], False, (), "p2p", "share cuda:1"),
        (["cuda:0", "cuda:1"], False, ((0, 1), (1, 0)), "p2p", "peer access"),
        (["cuda:0", "cuda:1"], False, ((0, 1),), "pinned", "cuda:1 cannot read cuda:0"),
        (["cuda:0", "cuda:1"], True, (), "pinned", "relayed"),
        (["cuda:0", "cpu"], True, (), "inproc", "torch copies"),
    ],
)
def test_choice(
    devices: list[str],
    one_process: bool,
    peers: tuple,
    name: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: (a.index, b.index) in peers)
    choice = choose_transport(devices, one_process)
    assert choice.name == name
    assert reason in choice.reason


def test_what_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TransferError, match="torch sees none here"):
        choose_transport(["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TransferError, match="no transport joins workers on cpu and cuda"):
        choose_transport(["cuda:0", "cpu"])


def test_create() -> None:
    assert isinstance(create_transport("auto", ["cpu", "cpu"]), ShmTransport)
    assert isinstance(create_transport("auto", ["cpu"], one_process=True, pools={}), InprocTransport)
    there = [name for name in TRANSPORTS if name != "nixl" or is_installed()]
    assert [create_transport(name, pools={}).name for name in there] == there
    with pytest.raises(TransferError, match="the same `pools`"):
        create_transport("inproc")
    with pytest.raises(
        TransferError,
        match="unknown transport 'pigeon'; choose from auto, inproc, shm, p2p, pinned, torchdist, nixl",
    ):
        create_transport("pigeon")
    with pytest.raises(ValueError, match="at least two slots"):
        PinnedTransport(slots=1)
    with pytest.raises(TransferError, match="between GPUs, not cpu memory"):
        create_transport("p2p").allocate((2, 2), torch.float32, torch.device("cpu"))


def test_adjacent_blocks_are_one_copy() -> None:
    assert list(runs([4, 5, 6, 9, 8, 0, 1])) == [(0, 4, 3), (3, 9, 1), (4, 8, 1), (5, 0, 2)]
    assert list(runs([3])) == [(0, 3, 1)]
