"""The source's side of `torchdist`: threads that answer pulls, as send and receive take two.

source  {"pair", "store"}        where both make their process group
reader  {"blocks", "seconds"}    a chunk, again and again; its bytes come by the group
reader  {"check"}                when all have come, if it cannot look itself: blocks
source  {"generations"}          of these
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from nanopd_lab.transfer.base import Pool
from nanopd_lab.transfer.process_groups import PairGroup, listening_store
from nanopd_lab.transfer.pull_service import WINDOW, line_of
from nanopd_lab.transfer.staging import Staging


class GroupAnswers:
    """See `Answers`. The store listens on `host` as well."""

    def __init__(self, pool: Pool, host: str) -> None:
        self._pool, self._store = pool, listening_store(host)
        self._numbers = itertools.count()

    def answer(
        self, connection: socket.socket, lines: BinaryIO, abort_by: Callable[[Callable[[], None]], None]
    ) -> None:
        """See `Answers`."""
        number = next(self._numbers)
        connection.sendall(line_of({"pair": number, "store": self._store.port}))
        store = dist.PrefixStore(str(number), self._store)
        group = PairGroup(store, 0, connection.getsockname()[0], self._pool.memory.device)
        abort_by(group.abort)
        connection.settimeout(None)
        self._send(connection, lines, group)

    def _send(self, connection: socket.socket, lines: Iterable[bytes], group: PairGroup) -> None:
        staging, number = Staging(self._pool, WINDOW), 0
        flying: list[list[tuple[dist.Work, torch.Tensor]]] = [[] for _ in range(WINDOW)]
        for line in lines:
            asked: dict[str, Any] = json.loads(line)
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
