"""The reader's side of `torchdist`: a process group beside the connection, which chunks are received through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from nanopd_lab.transfer.base import Pool
from nanopd_lab.transfer.process_groups import PairGroup, reached_store
from nanopd_lab.transfer.pull_link import Channel
from nanopd_lab.transfer.pull_service import WINDOW
from nanopd_lab.transfer.staging import Staging


class GroupChannel(Channel):
    """See `Channel`."""

    def __init__(self, details: dict[str, Any], own: Pool, seconds: float) -> None:
        self._joined: tuple[PairGroup, Staging] | None = None
        super().__init__(details, own, seconds)

    def join(self, seconds: float) -> None:
        """See `Channel`."""
        if self._joined is None:
            store = dist.PrefixStore(
                str(self.met["pair"]), reached_store(self.host, self.met["store"], seconds)
            )
            group = PairGroup(store, 1, self.address, self.own.memory.device)
            self._joined = group, Staging(self.own, WINDOW)

    def pull(
        self,
        blocks: Sequence[int],
        targets: Sequence[int],
        after: torch.cuda.Event | None,
        stopped: Callable[[], bool],
        seconds: Callable[[], float],
    ) -> None:
        """See `Channel`."""
        assert self._joined is not None
        group, staging = self._joined
        step = staging.blocks_each
        parts = [slice(first, first + step) for first in range(0, len(blocks), step)]
        flying: list[list[dist.Work]] = []
        for number, part in enumerate(parts):
            while len(flying) < min(number + WINDOW, len(parts)) and not stopped():
                asked = parts[len(flying)]
                # Asked for first: NCCL's first receive waits until the other side sends.
                self.say({"blocks": list(blocks[asked]), "seconds": seconds()})
                places = staging.incoming(len(flying), targets[asked])
                flying.append([group.receive(each) for each in places])
            if number == len(flying):
                return
            for work in flying[number]:
                group.wait(work, seconds())
            flying[number] = []
            staging.take_in(number, targets[part], after)

    def interrupt(self) -> None:
        """See `Channel`."""
        super().interrupt()
        if (joined := self._joined) is not None:
            joined[0].abort()
