"""The port that workers call: who has no key gets nowhere, and keeps nobody waiting."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection

import pytest

from nanopd_lab.cluster.clocks import ClockOffset, Ping, Pong, clock_identity
from nanopd_lab.cluster.ray_actor import Here
from nanopd_lab.cluster.ray_calls import PINGS, CallDesk
from nanopd_lab.cluster.ray_socket import connect, sever
from nanopd_lab.cluster.starter import WorkerStartError
from nanopd_lab.transfer.offers import Offer

KEY = b"k" * 32
Arrival = tuple[Here, ClockOffset | None, Connection]


class Door:
    """A desk, and who has come in."""

    def __init__(self) -> None:
        self.came: list[Arrival] = []
        self.somebody = threading.Event()
        self.desk = CallDesk("127.0.0.1", 0, KEY, self.let_in)

    def let_in(self, *arrival: object) -> bool:
        self.came.append(arrival)  # type: ignore[arg-type]
        self.somebody.set()
        return self.came[-1][0].ticket == "mine"


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.desk.close()
    for _, _, connection in door.came:
        connection.close()


def here(ticket: str = "mine", clock: str | None = None) -> Here:
    offer = Offer("w0", "host", "cpu", ())
    return Here(ticket, 1, "127.0.0.1", offer, clock_identity() if clock is None else clock)


def read_on(connection: Connection) -> None:
    while True:
        connection.recv_bytes()


def test_a_worker_with_the_key_is_let_in(door: Door) -> None:
    connection = connect(*door.desk.address, KEY)
    connection.send(here())
    assert door.somebody.wait(30)
    ((arrived, clock, theirs),) = door.came
    assert arrived == here()
    assert clock is None
    theirs.send("do this")
    assert connection.recv() == "do this"
    sever(theirs)
    with pytest.raises(EOFError):
        connection.recv()
    connection.close()


def test_another_clock_is_asked_first(door: Door) -> None:
    connection = connect(*door.desk.address, KEY)
    connection.send(here(clock="elsewhere"))
    for _ in range(PINGS):
        ping = connection.recv()
        assert isinstance(ping, Ping)
        connection.send(Pong(ping.sent, ping.sent + 50.0, ping.sent + 50.0))
    assert door.somebody.wait(30)
    clock = door.came[0][1]
    assert clock is not None
    offset, error = clock.read(ping.sent)
    assert abs(offset - 50.0) <= error + 1e-9
    connection.close()


def test_strangers_are_shown_out_and_keep_nobody_waiting(door: Door) -> None:
    silent = socket.create_connection(door.desk.address)
    babbling = socket.create_connection(door.desk.address)
    babbling.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
    with pytest.raises(OSError, match="no proof of the shared key"):
        connect(*door.desk.address, b"another key")
    with Client(door.desk.address) as keyless:
        keyless.send(here())
        with pytest.raises((EOFError, OSError)):
            read_on(keyless)
    assert not door.came
    connect(*door.desk.address, KEY).send(here())
    assert door.somebody.wait(30)
    silent.close()
    babbling.close()


def test_a_worker_that_nobody_waits_for_is_sent_away(door: Door) -> None:
    connection = connect(*door.desk.address, KEY)
    connection.send(here("yesterday's"))
    with pytest.raises((EOFError, OSError)):
        connection.recv()
    connection.close()


def test_a_port_that_is_taken_is_named(door: Door) -> None:
    host, port = door.desk.address
    with pytest.raises(WorkerStartError, match=f"cannot wait for workers at {host}, port {port}"):
        CallDesk(host, port, KEY, door.let_in)
