"""The contract of a transport: the decode worker pulls KV blocks out of another worker's pool.

    own = transport.allocate(...)             the pool's memory, where others can reach it
    address = transport.register(pool)        told to the other workers
    transport.connect(address)                theirs, told to this one
    transport.start(pull, deadline)           returns at once; the copy runs beside the computation
    transport.poll()                          what has ended since: each pull exactly once

Pulls are one-sided: the source worker takes no part and may be computing. What protects the reader from a block
that the source has given to somebody else in the meantime is the block's *generation*, a number that the source's
allocator raises before a block is handed out for new content. The source publishes it with the block; the reader
compares it after the copy. If it is still the same, nothing was written to the block while it was read.
"""

from __future__ import annotations

import enum
from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class TransferError(ValueError):
    """A pool cannot be reached, or a pull makes no sense; the message names the workers and the way out."""


class PullStatus(enum.Enum):
    """How a pull ended: all blocks are here; a block was re-used meanwhile; the copy failed, was late or cancelled."""

    DONE = "done"
    STALE = "stale"
    FAILED = "failed"


@dataclass(frozen=True)
class Pool:
    """One worker's KV memory.

    memory: `[num_blocks, ...]`, contiguous, one block's layers together
    generations: how often each block has been handed out; written by the allocator, read by other workers
    """

    memory: torch.Tensor
    generations: MutableSequence[int]

    @cached_property
    def num_blocks(self) -> int:
        """Blocks in it."""
        return self.memory.shape[0]

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.memory[0].numel() * self.memory.itemsize


@dataclass(frozen=True)
class PoolAddress:
    """Where to find a worker's pool. `details` is the transport's own and can be sent to another process."""

    worker: str
    transport: str
    num_blocks: int
    block_bytes: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Pull:
    """Copy `source_blocks[i]` of worker `source` to `target_blocks[i]` of the own pool.

    generations: of the source blocks when they were published
    """

    pull_id: int
    source: str
    source_blocks: Sequence[int]
    generations: Sequence[int]
    target_blocks: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.source_blocks) == len(self.generations) == len(self.target_blocks) > 0:
            raise TransferError(
                f"pull {self.pull_id} from {self.source}: {len(self.source_blocks)} source blocks, "
                f"{len(self.generations)} generations, {len(self.target_blocks)} target blocks; "
                "give as many of each, and at least one"
            )


@dataclass(slots=True)
class PullResult:
    """What became of a pull. `started` and `finished` are seconds of `time.monotonic()` (one clock for all processes
    of a machine); `num_bytes` counts the blocks' bytes if they arrived."""

    pull_id: int
    status: PullStatus
    started: float
    finished: float
    num_bytes: int = 0
    error: str | None = None


class Transport(Protocol):
    """Moves blocks into the pool of one worker. Used from one thread.

    Every pull that was started is reported by `poll` exactly once, also when it fails, is cancelled, passes its
    deadline or its source is gone; not before its target blocks are safe from further writes, so that their owner may
    then re-use them. A failed pull may have written part of its target blocks.
    """

    name: str

    def allocate(self, size: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uninitialised memory for a pool that this transport can show to others."""
        ...

    def generations(self, num_blocks: int) -> MutableSequence[int]:
        """Zeros that other workers can read: the pool's generation table."""
        ...

    def register(self, worker: str, pool: Pool) -> PoolAddress:
        """Show the own pool (made by `allocate` and `generations`) to others, under the name of this worker."""
        ...

    def connect(self, address: PoolAddress) -> None:
        """Reach another worker's pool, after the own one has been registered; a second address of the same worker
        (restarted) replaces the first, as if it had been disconnected.

        Raises:
            TransferError: it cannot be reached, or its blocks have another size.
        """
        ...

    def disconnect(self, worker: str) -> None:
        """Forget a worker that is gone; pulls from it under way fail or finish. Unknown names are ignored."""
        ...

    def start(self, pull: Pull, deadline: float) -> None:
        """Begin a pull; `deadline` on `time.monotonic()` is when it counts as failed.

        Raises:
            TransferError: not connected to its source, a block is out of range, a target block is named twice, or
                its id is that of a pull under way; nothing was started.
        """
        ...

    def poll(self) -> list[PullResult]:
        """The pulls that have ended since the last call. Never waits."""
        ...

    def cancel(self, pull_id: int) -> None:
        """End a pull early if possible; `poll` reports it as usual. Unknown ids are ignored."""
        ...

    def close(self) -> None:
        """Stop everything, release memory shared with others. Safe to call twice. The pulls that it cuts short are
        reported by a last `poll`; everything else is refused from then on."""
        ...
