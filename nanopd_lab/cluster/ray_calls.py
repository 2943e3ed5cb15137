"""Where workers on other nodes call: a port that lets in who has the key, and says which worker it is."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

from nanopd_lab.cluster.clocks import ClockOffset, Ping, clock_identity
from nanopd_lab.cluster.ray_actor import Here
from nanopd_lab.cluster.ray_socket import settled, welcome
from nanopd_lab.cluster.starter import WorkerStartError

PINGS = 10  # before the first message; then one with every beat
AT_ONCE = 64  # who has not shown a key; more wait


class CallDesk:
    """Waits for calls until it is closed.

    Args:
        host, port: to listen at; 0: any port that is free
        key: that callers must have
        arrived: told of a worker's first message, the offset of its clock (None: it is ours) and the connection, from a
            thread of its own; False: nobody is waiting for this one

    Raises:
        WorkerStartError: one cannot listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        key: bytes,
        arrived: Callable[[Here, ClockOffset | None, Connection], bool],
    ) -> None:
        self._key, self._arrived = key, arrived
        self._room = threading.Semaphore(AT_ONCE)
        try:
            self._listener = socket.create_server((host, port))
        except OSError as error:
            raise WorkerStartError(
                f"cannot wait for workers at {host}, port {port}: {error.strerror}; set host to an address of this "
                "machine that its workers reach, and port to one that is free"
            ) from error
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, name="nanopd-ray-accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            self._room.acquire()
            threading.Thread(
                target=self._answer, args=(channel,), name="nanopd-ray-answer", daemon=True
            ).start()

    def _answer(self, channel: socket.socket) -> None:
        """One call; what goes wrong ends it, and Ray tells that the actor has ended."""
        connection = None
        try:
            connection = welcome(channel, self._key)
            here: Here = connection.recv()
            clock = None if here.clock and here.clock == clock_identity() else _measured(connection)
            settled(connection)
            if not self._arrived(here, clock, connection):
                connection.close()
        except (OSError, EOFError):
            if connection is not None:
                connection.close()
        finally:
            self._room.release()

    def close(self) -> None:
        """Nobody is let in any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._listener.close()


def _measured(connection: Connection) -> ClockOffset:
    """The offset of the clock at the other end, which answers at once."""
    clock = ClockOffset()
    for _ in range(PINGS):
        connection.send(Ping(time.monotonic()))
        clock.observe(connection.recv(), time.monotonic())
    return clock
