"""One transport inside a machine and another between machines, over one pool: "shm+nixl", "p2p+torchdist", …

The pool is made by the one inside, which has to share its memory; the other takes any. Who is where is seen from a
pool's address.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import replace

import torch

from nanopd_lab.transfer.base import Pool, PoolAddress, Pull, PullResult, TransferError, Transport


class MixedTransport:
    """See `Transport`.

    Args:
        inside: between workers of this machine
        between: between machines
        host: of this worker; those with the same are reached through `inside`
    """

    def __init__(self, inside: Transport, between: Transport, host: str) -> None:
        self.name = f"{inside.name}+{between.name}"
        self._inside, self._between, self._host = inside, between, host
        self._reached: dict[str, Transport] = {}
        self._under_way: dict[int, Transport] = {}

    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """See `Transport`."""
        return self._inside.allocate(size, dtype, device)

    def generations(self, num_blocks: int) -> MutableSequence[int]:
        """See `Transport`."""
        return self._inside.generations(num_blocks)

    def register(self, worker: str, pool: Pool) -> PoolAddress:
        """See `Transport`."""
        address = self._inside.register(worker, pool)
        between = self._between.register(worker, pool)
        details = {"host": self._host, "inside": address.details, "between": between.details}
        return replace(address, transport=self.name, details=details)

    def connect(self, address: PoolAddress) -> None:
        """See `Transport`."""
        here = address.details.get("host") == self._host
        chosen, part = (self._inside, "inside") if here else (self._between, "between")
        # The parts inside may have different names on different machines, for different GPUs.
        same = address.transport == self.name if here else _between(address.transport) == _between(self.name)
        if not same:
            raise TransferError(
                f"{address.worker}'s pool is shown by transport {address.transport!r}, this one is {self.name!r}; "
                "give all workers the same"
            )
        chosen.connect(replace(address, transport=chosen.name, details=address.details[part]))
        if (before := self._reached.get(address.worker)) not in (None, chosen):
            assert before is not None
            before.disconnect(address.worker)  # it came back on another machine
        self._reached[address.worker] = chosen

    def disconnect(self, worker: str) -> None:
        """See `Transport`."""
        self._reached.pop(worker, None)
        for each in (self._inside, self._between):
            each.disconnect(worker)

    def start(self, pull: Pull, deadline: float) -> None:
        """See `Transport`."""
        if pull.pull_id in self._under_way:
            raise TransferError(f"pull {pull.pull_id} is under way already; give every pull its own id")
        chosen = self._reached.get(pull.source, self._between)
        if pull.source not in self._reached and self._reached:
            raise TransferError(
                f"pull {pull.pull_id}: not connected to {pull.source!r}, only to {sorted(self._reached)}; connect to "
                "its address first"
            )
        chosen.start(pull, deadline)
        self._under_way[pull.pull_id] = chosen

    def poll(self) -> list[PullResult]:
        """See `Transport`."""
        ended = [*self._inside.poll(), *self._between.poll()]
        for result in ended:
            self._under_way.pop(result.pull_id, None)
        return ended

    def cancel(self, pull_id: int) -> None:
        """See `Transport`."""
        if chosen := self._under_way.get(pull_id):
            chosen.cancel(pull_id)

    def close(self) -> None:
        """See `Transport`."""
        # The one between first: it may be writing into memory of the one inside.
        self._between.close()
        self._inside.close()


def _between(name: str) -> str:
    return name.partition("+")[2]
