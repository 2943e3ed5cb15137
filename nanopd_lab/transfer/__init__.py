"""Moving KV blocks between the pools of workers."""

from nanopd_lab.transfer.base import (
    Pool,
    PoolAddress,
    Pull,
    PullResult,
    PullStatus,
    TransferError,
    Transport,
)

__all__ = ["Pool", "PoolAddress", "Pull", "PullResult", "PullStatus", "TransferError", "Transport"]
