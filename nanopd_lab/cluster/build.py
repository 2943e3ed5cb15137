"""A worker with a real engine in it."""

from __future__ import annotations

import time
from collections.abc import Callable

from nanopd_lab.cluster.config import ClusterParts
from nanopd_lab.cluster.host import WorkerHost
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.cluster.messages import Capacity
from nanopd_lab.engine.config import EngineConfig
from nanopd_lab.engine.engine import Engine
from nanopd_lab.engine.handover import HandoverScheduler
from nanopd_lab.kv import BlockAllocator
from nanopd_lab.model.loading import LoadedModel
from nanopd_lab.transfer import Pool, Transport

GENERATIONS_A_LIFE = 1 << 32


def build_host(
    name: str,
    config: EngineConfig,
    transport: Transport,
    terms: LeaseTerms | None = None,
    *,
    life: int = 0,
    trace: bool = False,
    loaded: LoadedModel | None = None,
    clock: Callable[[], float] = time.monotonic,
    parts: ClusterParts | None = None,
) -> tuple[WorkerHost, LoadedModel]:
    """Load the model, lay out the pool where others can reach it, and put a worker around both.

    Args:
        life: how often a worker of this name has been started before. Generations begin anew in each, so that a
            block of an earlier one is never taken for a valid one.
        trace: keep a record of every step
        loaded: another worker's model in this process, to share its weights
        parts: exchanged parts of the worker

    Returns:
        the host, and the model, for others to share

    Raises:
        ValueError: as `Engine`.
    """
    parts = parts or ClusterParts()
    engine = Engine(config, clock, loaded, HandoverScheduler, transport.allocate)
    scheduler = engine.scheduler
    assert isinstance(scheduler, HandoverScheduler)
    allocator = scheduler.allocator
    if not isinstance(allocator, BlockAllocator):
        raise ValueError(
            f"a worker's allocator must be a BlockAllocator or derive from it, not {type(allocator).__name__}: others "
            "rely on its generations"
        )
    generations = transport.generations(allocator.num_blocks)
    for block in range(allocator.num_blocks):
        generations[block] = life * GENERATIONS_A_LIFE
    allocator.generations = generations
    block_bytes = engine.cache.shape.block_bytes
    capacity = Capacity(
        allocator.num_blocks,
        config.block_size,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        engine.max_model_len,
        block_bytes,
        str(engine.device),
    )
    host = WorkerHost(
        parts.worker(name, scheduler, terms, lease=parts.lease),
        engine.runner,
        transport,
        capacity,
        transport.register(name, Pool(engine.cache.tensor, generations)),
        ahead=engine.loop.ahead,
        clock=clock,
        steps=[] if trace else None,
    )
    return host, engine.loaded
