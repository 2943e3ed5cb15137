"""The source's side of `torchdist`: threads that answer pulls, as send and receive take two.

    reader  {"token"}                who is asked, so that nobody else who got the port answers
    source  {"pair", "store"}        where both make their process group
    reader  {"blocks", "seconds"}    a chunk, again and again; its bytes come by the group
    reader  {"check"}                when all have come, if it cannot look itself: blocks
    source  {"generations"}          of these

Lines of JSON over a TCP connection, which also shows at once when the other side is gone. A source never sends what was
not asked for, so a reader ends a pull by asking for no more.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from nanopd_lab.transfer.base import Pool
from nanopd_lab.transfer.process_groups import CONNECT_S, PairGroup, listening_store
from nanopd_lab.transfer.staging import Staging

WINDOW = 4  # chunks asked for and not taken in
_JOIN_S = 2.0


def line_of(message: dict[str, Any]) -> bytes:
    """A message as it travels."""
    return json.dumps(message).encode() + b"\n"


class PullService:
    """Shows a pool to readers at a port of `host`, each with a thread of its own."""

    def __init__(self, pool: Pool, host: str) -> None:
        self._pool = pool
        self._listener = socket.create_server((host, 0))
        self._store = listening_store(host)
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._served: dict[threading.Thread, tuple[socket.socket, list[PairGroup]]] = {}
        self._closed = False
        self.details = {"host": host, "port": self._listener.getsockname()[1], "token": uuid.uuid4().hex}
        self._acceptor = threading.Thread(target=self._accept, name="nanopd-torchdist-accept", daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="nanopd-torchdist-serve", daemon=True
            )
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._served[thread] = (connection, [])
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        """One reader, until it goes. What goes wrong ends this pair and nothing else."""
        with connection, suppress(OSError, RuntimeError, ValueError, KeyError):
            connection.settimeout(CONNECT_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            lines = connection.makefile("rb")
            if json.loads(lines.readline())["token"] == self.details["token"]:
                number = next(self._numbers)
                connection.sendall(line_of({"pair": number, "store": self._store.port}))
                group = PairGroup(
                    dist.PrefixStore(str(number), self._store),
                    0,
                    connection.getsockname()[0],
                    self._pool.memory.device,
                )
                with self._lock:
                    self._served[threading.current_thread()][1].append(group)
                connection.settimeout(None)
                self._answer(connection, lines, group)
        with self._lock:
            self._served.pop(threading.current_thread(), None)

    def _answer(self, connection: socket.socket, lines: Iterable[bytes], group: PairGroup) -> None:
        staging, number = Staging(self._pool, WINDOW), 0
        flying: list[list[tuple[dist.Work, torch.Tensor]]] = [[] for _ in range(WINDOW)]
        for line in lines:
            asked = json.loads(line)
            if "check" in asked:
                generations = [self._pool.generations[block] for block in asked["check"]]
                connection.sendall(line_of({"generations": generations}))
                continue
            blocks, seconds = asked["blocks"], asked["seconds"]
            if not 0 < len(blocks) <= staging.blocks_each or min(blocks) < 0:
                raise ValueError(f"{len(blocks)} blocks from {min(blocks)}")
            slot = number % WINDOW
            for work, _ in flying[slot]:
                group.wait(work, seconds)
            flying[slot] = [(group.send(each), each) for each in staging.outgoing(number, blocks)]
            number += 1

    def close(self) -> None:
        """Answer nobody any more."""
        with self._lock:
            self._closed = True
            served = dict(self._served)
        with suppress(OSError):  # somebody must come for `accept` to end
            socket.create_connection(self._listener.getsockname()[:2], timeout=1).close()
        self._acceptor.join(_JOIN_S)
        self._listener.close()
        for connection, groups in served.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            for group in groups:
                group.abort()
        for thread in served:
            thread.join(_JOIN_S)
