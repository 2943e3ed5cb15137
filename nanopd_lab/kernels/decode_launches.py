"""Launches of paged decode: the rungs of the ladder, and how the split ones divide a batch among blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import AttentionShape, DeviceLimits, Launch

RUNGS = ("naive", "online", "gqa", "split", "mma")
SPLIT_RUNGS = ("split", "mma")
FILES = {
    "naive": "decode_a_naive.cu",
    "online": "decode_b_online.cu",
    "gqa": "decode_c_gqa.cu",
    "split": "decode_d_split.cu",
    "mma": "decode_e_mma.cu",
}
# Shared memory that a block must leave to the system on every architecture since sm_80.
RESERVED_SHARED_BYTES = 1024
DECODE_THREADS = 128
WARPS_PER_MULTIPROCESSOR = 8
MAX_ITEMS = 1 << 16


@dataclass(frozen=True)
class SplitTuning:
    """Constants of `cuda/split_kv.h`: warps a block, tokens a warp and step, stages in shared memory."""

    warps: int
    warp_tokens: int
    stages: int

    def stage_bytes(self, shape: AttentionShape) -> int:
        """One warp's stage: K, V and the queries of a group."""
        return (2 * self.warp_tokens + shape.group) * shape.head_dim * shape.element_bytes

    def shared_bytes(self, shape: AttentionShape) -> int:
        """A block's dynamic shared memory."""
        return self.warps * self.stages * self.stage_bytes(shape)

    def blocks_per_multiprocessor(self, shape: AttentionShape, limits: DeviceLimits) -> int:
        """How many such blocks a multiprocessor is given: what shared memory holds, up to eight warps."""
        held = limits.shared_bytes_per_multiprocessor // (
            self.shared_bytes(shape) + RESERVED_SHARED_BYTES + 128
        )
        return max(1, min(held, WARPS_PER_MULTIPROCESSOR // self.warps))


# In order of preference. Measured on an H200 over the twelve shapes of the bench: eight warps in one block
# beat two blocks of four for up to four sequences of eight KV heads (fewer parts to join), not beyond; more
# stages or more blocks than are resident at once only cost.
FEW_ITEMS = 32
SMALL_BATCH = SplitTuning(8, 16, 2)
TUNINGS = (
    SplitTuning(4, 16, 2),
    SplitTuning(2, 16, 2),
    SplitTuning(4, 8, 2),
    SplitTuning(2, 8, 2),
    SplitTuning(1, 16, 2),
    SplitTuning(1, 8, 2),
)


def tuning_for(shape: AttentionShape, rung: str, limits: DeviceLimits, sequences: int) -> SplitTuning:
    """The constants for a batch: what fits in shared memory, twice if possible."""
    least = 16 if rung == "mma" else 8
    few = (SMALL_BATCH,) if sequences * shape.kv_heads <= FEW_ITEMS and rung == "mma" else ()
    for blocks, choices in ((1, few), (2, TUNINGS), (1, TUNINGS)):
        room = min(
            limits.shared_bytes_per_block,
            limits.shared_bytes_per_multiprocessor // blocks - RESERVED_SHARED_BYTES - 128,
        )
        for tuning in choices:
            if tuning.warp_tokens >= least and tuning.shared_bytes(shape) <= room:
                return tuning
    raise KernelArgumentError(f"{shape} needs more shared memory than {limits.shared_bytes_per_block} bytes")


def best_rung(shape: AttentionShape) -> str:
    """The rung the engine uses: tensor cores for 16-bit types, the split kernel for fp32."""
    return "split" if shape.dtype == torch.float32 else "mma"


def decode_launch(
    rung: str,
    shape: AttentionShape,
    sequences: int,
    max_context: int,
    limits: DeviceLimits | None = None,
    tuning: SplitTuning | None = None,
    blocks: int | None = None,
) -> Launch:
    """Launch of one rung of the decode ladder.

    max_context: an upper bound (block-table width times block size will do); only rung "naive" depends on it,
    for its scores. `blocks` overrides the grid of the split rungs (the emulator has no multiprocessors to
    fill). Raises KernelArgumentError for an unknown rung, fp32 on tensor cores, or a context too long for
    rung "naive".
    """
    limits = limits or DeviceLimits()
    if rung not in RUNGS:
        raise KernelArgumentError(f"rung={rung!r}: choose from {', '.join(RUNGS)}")
    kernel = f"paged_decode_{rung}"
    if rung == "mma" and shape.dtype == torch.float32:
        raise KernelArgumentError("rung='mma' takes float16 or bfloat16, not float32; use rung='split'")
    if rung in SPLIT_RUNGS:
        if sequences * shape.kv_heads > MAX_ITEMS:
            raise KernelArgumentError(
                f"{sequences} sequences x {shape.kv_heads} KV heads exceed {MAX_ITEMS} work items; "
                "split the batch"
            )
        chosen = tuning or tuning_for(shape, rung, limits, sequences)
        grid = blocks or limits.multiprocessors * chosen.blocks_per_multiprocessor(shape, limits)
        defines = {
            **shape.defines,
            "WARPS": chosen.warps,
            "WARP_TOKENS": chosen.warp_tokens,
            "STAGES": chosen.stages,
        }
        return Launch(
            FILES[rung], kernel, (grid, 1, 1), 32 * chosen.warps, chosen.shared_bytes(shape), defines, True
        )
    heads = shape.kv_heads if rung == "gqa" else shape.heads
    shared = 0
    if rung == "naive":
        shared = 4 * max_context
        room = limits.shared_bytes_per_block - 2048
        if shared > room:
            raise KernelArgumentError(
                f"rung='naive' keeps one score a token in shared memory: {max_context} tokens exceed "
                f"{room // 4}; use another rung"
            )
    return Launch(FILES[rung], kernel, (heads, sequences, 1), DECODE_THREADS, shared, shape.defines)


def max_grid(limits: DeviceLimits) -> int:
    """The most blocks that a split rung is launched with on this device."""
    return 16 * limits.multiprocessors
