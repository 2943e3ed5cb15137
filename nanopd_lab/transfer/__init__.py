"""Moving KV blocks between the pools of workers.

`base` is the contract, `registry` makes a transport by name or chooses one, and a module each is a transport:

    inproc     workers of one process; deterministic, with hooks for faults
    shm        processes on CPUs; pools in shared memory
    p2p        GPUs, one launch a pull that reads the source's memory
    pinned     GPUs that cannot read each other; relayed through pinned host memory
    torchdist  processes of one host or several, through torch.distributed: gloo on CPUs, NCCL on GPUs
    nixl       the same through NIXL (extra `nixl`): RDMA or TCP, written straight into the reader's pool
    mixed      one inside a host and one between hosts

`offers` chooses for workers on several hosts. `pulls` holds what they do alike, `segments` memory that processes share,
`cuda_pools` and `device_memory` the same for GPUs; `pairs`, `pull_service` and `pull_link` what the networked ones do
alike, `group_answers`, `group_channel`, `process_groups` and `staging` belong to torchdist, `nixl_…` to nixl.
"""

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
