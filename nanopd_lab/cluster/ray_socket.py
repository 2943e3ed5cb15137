"""The connection between the controller and a worker on some node: TCP, with both sides' proof of a shared key.

Messages are pickled, as all of Ray's are: who has the key may do anything, so it travels through Ray only, is new for
every cluster, and whoever connects without it is shown out before anything is read. Nothing is encrypted.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

HANDSHAKE_S = 10.0
LOST_S = 30.0  # for what was sent to be acknowledged by the other machine


def connect(host: str, port: int, key: bytes) -> Connection:
    """The worker's side.

    Raises:
        OSError: nobody listens there, or somebody without the key.
    """
    channel = socket.create_connection((host, port), HANDSHAKE_S)
    channel.settimeout(None)
    connection = _proved(channel, key, first=False)
    settled(connection)
    return connection


def welcome(channel: socket.socket, key: bytes) -> Connection:
    """The controller's side; until it is `settled`, the other side must not be silent for long.

    Raises:
        OSError: who has connected has no key, or takes too long to show it.
    """
    return _proved(channel, key, first=True)


def settled(connection: Connection) -> None:
    """From now on wait for messages for as long as it takes."""
    with _socket_of(connection) as channel:
        _set_timeouts(channel, 0.0)


def sever(connection: Connection) -> None:
    """End it under whoever reads or writes there, without closing the file that they use."""
    with suppress(OSError), _socket_of(connection) as channel:
        channel.shutdown(socket.SHUT_RDWR)


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))


def _proved(channel: socket.socket, key: bytes, first: bool) -> Connection:
    channel.setsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
    )  # a token must not wait for an acknowledgement
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if (
        sys.platform == "linux"
    ):  # a machine that is gone says nothing: beats are sent, and must be acknowledged
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(LOST_S * 1000))
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, int(LOST_S / 3))
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, int(LOST_S / 3))
    _set_timeouts(channel, HANDSHAKE_S)
    connection = Connection(channel.detach())
    try:
        for step in (deliver_challenge, answer_challenge) if first else (answer_challenge, deliver_challenge):
            step(connection, key)
    except (AuthenticationError, EOFError, OSError) as error:
        connection.close()
        raise OSError(f"no proof of the shared key: {type(error).__name__}: {error}") from error
    return connection


def _set_timeouts(channel: socket.socket, seconds: float) -> None:
    """In the kernel: `Connection` reads and writes the file itself."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
