"""`torchdist`: torch.distributed carries the blocks, gloo between CPUs and NCCL between GPUs, on one host or several.

Every pair has a process group of its own; see `pairs`.
"""

from __future__ import annotations

from nanopd_lab.transfer.base import Pool, PoolAddress, TransferError
from nanopd_lab.transfer.device_memory import uuid_of
from nanopd_lab.transfer.group_answers import GroupAnswers
from nanopd_lab.transfer.group_channel import GroupChannel
from nanopd_lab.transfer.pairs import PairTransport


class TorchDistTransport(PairTransport):
    """Pulls through torch.distributed; see `PairTransport`."""

    name = "torchdist"

    def _check(self, address: PoolAddress, own: Pool) -> None:
        if own.memory.is_cuda and address.details["gpu"] == uuid_of(own.memory.device):
            raise TransferError(
                f"{address.worker} and {self._worker} share a GPU, and NCCL joins two; use 'p2p', which copies "
                "inside one"
            )

    def _answers(self, pool: Pool, host: str) -> GroupAnswers:
        return GroupAnswers(pool, host)

    def _channel_maker(self) -> type[GroupChannel]:
        return GroupChannel
