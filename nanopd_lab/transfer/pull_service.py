"""The source's side of transports that need it: a port where readers ask, and a thread for each that answers.

    reader  {"token"}    who is asked, so that nobody else who got the port answers
    …                    what the transport's own answering says and hears

Lines of JSON over a TCP connection, which also shows at once when the other side is gone. A source never sends what was
not asked for, so a reader ends a pull by asking for no more.
"""

from __future__ import annotations

import json
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

CONNECT_S = 5.0
LOOPBACK = "127.0.0.1"
WINDOW = 4  # chunks asked for and not taken in
_JOIN_S = 2.0


def line_of(message: dict[str, Any]) -> bytes:
    """A message as it travels."""
    return json.dumps(message).encode() + b"\n"


class Answers(Protocol):
    """What a transport does for readers, each in a thread of its own."""

    def answer(
        self, connection: socket.socket, lines: BinaryIO, abort_by: Callable[[Callable[[], None]], None]
    ) -> None:
        """One reader, until it goes. May raise whatever: that ends this pair and nothing else.

        Args:
            connection: with a timeout of `CONNECT_S`, for as long as both get to know each other
            lines: what the reader says
            abort_by: takes a function that ends from another thread what the connection's end does not
        """
        ...


class PullService:
    """Listens at a port of `host`; `name` is that of its threads."""

    def __init__(self, host: str, answers: Answers, name: str) -> None:
        self._answers, self._name = answers, f"nanopd-{name}"
        self._listener = socket.create_server((host, 0))
        self._lock = threading.Lock()
        self._served: dict[threading.Thread, tuple[socket.socket, list[Callable[[], None]]]] = {}
        self._closed = False
        self.details = {"host": host, "port": self._listener.getsockname()[1], "token": uuid.uuid4().hex}
        self._acceptor = threading.Thread(target=self._accept, name=f"{self._name}-accept", daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(
                target=self._serve, args=(connection,), name=f"{self._name}-serve", daemon=True
            )
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                # Who has ended leaves here, not by itself: between its last step and its end it is to be waited for.
                self._served = {each: held for each, held in self._served.items() if each.is_alive()}
                self._served[thread] = (connection, [])
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, RuntimeError, ValueError, KeyError):
            connection.settimeout(CONNECT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lines = connection.makefile("rb")
            if json.loads(lines.readline())["token"] == self.details["token"]:
                self._answers.answer(connection, lines, self._abort_by)
        with self._lock:
            self._served[threading.current_thread()][1].clear()

    def _abort_by(self, abort: Callable[[], None]) -> None:
        with self._lock:
            self._served[threading.current_thread()][1].append(abort)

    def close(self) -> None:
        """Answer nobody any more."""
        with self._lock:
            self._closed = True
            served = dict(self._served)
        with suppress(OSError):  # somebody must come for `accept` to end
            socket.create_connection(self._listener.getsockname()[:2], timeout=1).close()
        self._acceptor.join(_JOIN_S)
        self._listener.close()
        for connection, aborts in served.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            for abort in aborts:
                abort()
        for thread in served:
            thread.join(_JOIN_S)
