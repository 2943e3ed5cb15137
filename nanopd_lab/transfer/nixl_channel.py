"""The reader's side of `nixl`: an agent beside the connection, through which the source writes into the own pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from nanopd_lab.transfer.base import Pool
from nanopd_lab.transfer.nixl_agent import Agent
from nanopd_lab.transfer.pull_link import Channel
from nanopd_lab.transfer.pull_service import WINDOW

CHUNK_BYTES = 16 << 20  # asked for at once: 5 ms over TCP, and a line each


class NixlChannel(Channel):
    """See `Channel`."""

    def __init__(self, details: dict[str, Any], own: Pool, seconds: float) -> None:
        self._agent: Agent | None = None
        self._heard: dict[int, int] = {}
        super().__init__(details, own, seconds)

    def join(self, seconds: float) -> None:
        """See `Channel`."""
        if self._agent is None:
            self._agent = Agent(self.address, self.own.memory, passive=True)
            self.say(self._agent.card)
            self._answer(seconds)

    def pull(
        self,
        blocks: Sequence[int],
        targets: Sequence[int],
        after: torch.cuda.Event | None,
        stopped: Callable[[], bool],
        seconds: Callable[[], float],
    ) -> None:
        """See `Channel`."""
        if after is not None:
            after.synchronize()
        self._heard.clear()
        step = max(1, CHUNK_BYTES // self.own.block_bytes)
        parts = [slice(first, first + step) for first in range(0, len(blocks), step)]
        asked = 0
        for number, part in enumerate(parts):
            while asked < min(number + WINDOW, len(parts)) and not stopped():
                each = parts[asked]
                self.say({
                    "blocks": list(blocks[each]), "targets": list(targets[each]), "seconds": seconds(),
                })  # fmt: skip
                asked += 1
            if number == asked:
                return
            self._heard.update(zip(blocks[part], self._answer(seconds())["generations"], strict=True))

    def generations(self, blocks: Sequence[int], seconds: float) -> list[int]:
        """See `Channel`; the source has said them with the blocks."""
        return [self._heard[block] for block in blocks]

    def _answer(self, seconds: float) -> dict[str, Any]:
        answer = self.hear(seconds)
        if "error" in answer:
            raise ConnectionError(answer["error"])
        return answer

    def close(self) -> None:
        """See `Channel`."""
        super().close()
        if self._agent is not None:
            self._agent.close()
            self._agent = None
