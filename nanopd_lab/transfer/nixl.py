"""`nixl`: NIXL carries the blocks between machines, by RDMA where both ends have it, else by TCP.

Every pair has two agents of its own; see `pairs`. The source's agent writes into the reader's pool, as the reader asks.
A read by the reader would need no answer, and was tried first (NIXL 1.5.1). Over TCP UCX has writes and only imitates
reads: these copy twice more, a late one is ended only by dropping the agent, and a source that then finds the reader
of a queued read gone is aborted by UCX, the whole process.

UCX knows no passwords: whoever reaches its port can read and write the memory of this process. Hence loopback by
default, and otherwise a network of one's own.
"""

from __future__ import annotations

from nanopd_lab.transfer.base import Pool
from nanopd_lab.transfer.nixl_agent import load_bindings
from nanopd_lab.transfer.nixl_answers import NixlAnswers
from nanopd_lab.transfer.nixl_channel import NixlChannel
from nanopd_lab.transfer.pairs import PairTransport
from nanopd_lab.transfer.pull_service import LOOPBACK


class NixlTransport(PairTransport):
    """Pulls through NIXL; see `PairTransport`.

    Raises:
        TransferError: NIXL is not installed.
    """

    name = "nixl"

    def __init__(self, host: str = LOOPBACK, shared_tables: bool = True) -> None:
        load_bindings()
        super().__init__(host, shared_tables)

    def _answers(self, pool: Pool, host: str) -> NixlAnswers:
        return NixlAnswers(pool)

    def _channel_maker(self) -> type[NixlChannel]:
        return NixlChannel
