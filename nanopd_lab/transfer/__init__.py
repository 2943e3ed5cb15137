"""Moving KV blocks between the pools of workers.

`base` is the contract, `registry` makes a transport by name or chooses one, and a module each is a transport:

    inproc     workers of one process; deterministic, with hooks for faults
    shm        processes on CPUs; pools in shared memory
    p2p        GPUs, one launch a pull that reads the source's memory
    pinned     GPUs that cannot read each other; relayed through pinned host memory
    torchdist  processes of one host or several, through torch.distributed: gloo on CPUs, NCCL on GPUs

`pulls` holds what they do alike, `segments` memory that processes share, `cuda_pools` and `device_memory` the same for
GPUs; `pull_service`, `pull_link`, `process_groups` and `staging` belong to torchdist.
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
