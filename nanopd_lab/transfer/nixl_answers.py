"""The source's side of `nixl`: a thread for each reader, and an agent that writes what it asks for into its pool.

source  {"ready"}
reader  {"agent", "base", "device"}         who it is, where its pool lies
source  {"joined"}
reader  {"blocks", "targets", "seconds"}    a chunk, again and again; several may be asked for at once
source  {"generations"} or {"error"}        all bytes of a chunk have arrived; what its blocks were by then
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from nanopd_lab.transfer.base import Pool
from nanopd_lab.transfer.nixl_agent import Agent
from nanopd_lab.transfer.pull_link import START_S
from nanopd_lab.transfer.pull_service import line_of

IN_FLIGHT = 2  # chunks that are written at once, so that the link never waits for a line
_LOOK_S = 2e-4  # between two looks at what has left and arrived; the kernel's buffers hold five times that


class _Chunk(NamedTuple):
    handle: int
    blocks: Sequence[int]
    deadline: float


class NixlAnswers:
    """See `Answers`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def answer(
        self, connection: socket.socket, lines: BinaryIO, abort_by: Callable[[Callable[[], None]], None]
    ) -> None:
        """See `Answers`."""
        stop = threading.Event()
        abort_by(stop.set)
        connection.settimeout(START_S)
        connection.sendall(line_of({"ready": True}))
        if not (line := lines.readline()):
            return
        agent = Agent(connection.getsockname()[0], self._pool.memory, passive=False)
        try:
            agent.meet(json.loads(line))
            connection.sendall(line_of({"joined": True}))
            self._write(connection, lines, agent, stop)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                connection.sendall(line_of({"error": str(error)}))
            raise
        finally:
            agent.close()

    def _write(self, connection: socket.socket, lines: BinaryIO, agent: Agent, stop: threading.Event) -> None:
        flying: deque[_Chunk] = deque()
        while True:
            if flying and (len(flying) == IN_FLIGHT or not _waiting(connection, lines)):
                self._finish(connection, agent, flying.popleft(), stop)
                continue
            connection.settimeout(None)
            if not (line := lines.readline()):
                return
            asked = json.loads(line)
            blocks, targets = asked["blocks"], asked["targets"]
            if not 0 <= min(blocks) <= max(blocks) < self._pool.num_blocks or len(blocks) != len(targets):
                raise ValueError(f"blocks {blocks} to {targets}")
            if _is_closed(connection):  # a reader that has given up has other plans with these blocks
                return
            deadline = time.monotonic() + asked["seconds"]
            flying.append(_Chunk(agent.write(blocks, targets), blocks, deadline))

    def _finish(self, connection: socket.socket, agent: Agent, chunk: _Chunk, stop: threading.Event) -> None:
        while not agent.written(chunk.handle):
            if time.monotonic() > chunk.deadline or stop.is_set():
                raise TimeoutError("late: the deadline passed" if not stop.is_set() else "closed")
            time.sleep(_LOOK_S)
        # Read after the bytes were: see `pulls`.
        generations = [self._pool.generations[block] for block in chunk.blocks]
        connection.settimeout(None)
        connection.sendall(line_of({"generations": generations}))


def _is_closed(connection: socket.socket) -> bool:
    """By the reader, also if there are lines of it left to read."""
    poll = select.poll()
    poll.register(connection, select.POLLRDHUP)
    return bool(poll.poll(0))


def _waiting(connection: socket.socket, lines: BinaryIO) -> bool:
    """Whether the reader has said something."""
    connection.settimeout(0)
    return bool(lines.peek(1))  # type: ignore[attr-defined]  # a BufferedReader
