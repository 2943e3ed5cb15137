"""Which file, which constants, which grid: everything about a launch that depends only on shapes.

Pure functions of host-known numbers, shared by the GPU path, the emulator, the tests and the bench. Nothing
here
looks at a device tensor: that is what lets a launch be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.resources import cuda_dir

ELEMENTS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float"}
HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (8, 16, 32)
MAX_GROUP = 8
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
class DeviceLimits:
    """What a launch must know of the GPU. The default is Hopper's."""

    multiprocessors: int = 132
    shared_bytes_per_block: int = 227 * 1024
    shared_bytes_per_multiprocessor: int = 228 * 1024


@dataclass(frozen=True)
class AttentionShape:
    """The compile-time constants of an attention kernel. Raises KernelArgumentError for unsupported ones."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        def refuse(name: str, value: object, allowed: object) -> None:
            raise KernelArgumentError(
                f"{name}={value} is not supported by the CUDA kernels (allowed: {allowed}); "
                "use the torch backend"
            )

        if self.dtype not in ELEMENTS:
            refuse("dtype", self.dtype, "float16, bfloat16, float32")
        if self.head_dim not in HEAD_DIMS:
            refuse("head_dim", self.head_dim, HEAD_DIMS)
        if self.block_size not in BLOCK_SIZES:
            refuse("block_size", self.block_size, BLOCK_SIZES)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            refuse("heads", self.heads, f"multiples of kv_heads={self.kv_heads}")
        if not 1 <= self.group <= MAX_GROUP:
            refuse("query heads per KV head", self.group, f"1 to {MAX_GROUP}")

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    @property
    def defines(self) -> dict[str, object]:
        """The macros of `cuda/paged.h`."""
        return {
            "ELEMENT": ELEMENTS[self.dtype],
            "HEAD_DIM": self.head_dim,
            "BLOCK_SIZE": self.block_size,
            "GROUP": self.group,
        }


@dataclass(frozen=True)
class Launch:
    """One kernel with its constants and its launch shape."""

    file: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    defines: Mapping[str, object] = field(default_factory=dict)
    overlaps: bool = (
        False  # it calls `wait_for_previous`, so it may begin before the kernel before it has ended
    )

    @property
    def source(self) -> str:
        """The text of the kernel's file."""
        return (cuda_dir() / self.file).read_text()


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


def decode_workspace_bytes(shape: AttentionShape, blocks: int) -> int:
    """Scratch memory of the split rungs: counters, then two places a block for partial outputs and sums."""
    return 4 * MAX_ITEMS + 2 * blocks * shape.group * (shape.head_dim + 2) * 4


def workspace_bytes(shape: AttentionShape, limits: DeviceLimits | None = None) -> int:
    """Scratch memory that decode and prefill take turns to use, on a device of such limits."""
    limits = limits or DeviceLimits()
    decode = decode_workspace_bytes(shape, max_grid(limits))
    if shape.dtype == torch.float32:
        return decode
    return max(decode, prefill_workspace_bytes(shape, prefill_launch(shape, limits)))


def _split(
    workspace: torch.Tensor, shape: AttentionShape, needed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if workspace.dtype != torch.uint8 or not workspace.is_contiguous() or workspace.numel() < needed:
        raise KernelArgumentError(
            f"workspace must be contiguous uint8 of at least {needed} bytes, zeroed once (make_workspace); "
            f"got {workspace.dtype} of {workspace.numel()}"
        )
    counters = 4 * MAX_ITEMS
    outputs = counters + (needed - counters) // (shape.head_dim + 2) * shape.head_dim
    return (
        workspace[counters:outputs].view(torch.float32),
        workspace[outputs:needed].view(torch.float32),
        workspace[:counters].view(torch.int32),
    )


def split_workspace(
    workspace: torch.Tensor, shape: AttentionShape, blocks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(partial, partial sums, counters): views of a uint8 workspace, which must have been zeroed once.

    Raises KernelArgumentError when it is too small for `blocks`.
    """
    return _split(workspace, shape, decode_workspace_bytes(shape, blocks))


# Thread blocks of paged prefill that a multiprocessor holds: what its registers allow.
PREFILL_RESIDENT = {64: 2, 128: 1, 256: 2}
PREFILL_PLACES = 4  # parts of divided tiles, for each thread block


def prefill_launch(
    shape: AttentionShape, limits: DeviceLimits | None = None, warps: int = 8, blocks: int | None = None
) -> Launch:
    """Launch of paged prefill: as many blocks as the GPU holds, whatever the batch. They divide it on the device.

    `blocks` overrides the grid. Raises KernelArgumentError for fp32 (its products don't run on these tensor-core
    instructions).
    """
    if shape.dtype == torch.float32:
        raise KernelArgumentError(
            "paged prefill takes float16 or bfloat16; fp32 goes through gather and SDPA"
        )
    limits = limits or DeviceLimits()
    keys = 32 if shape.head_dim == 256 else 64
    if shape.head_dim == 256:
        warps = 4
    return Launch(
        "prefill.cu",
        "paged_prefill",
        (blocks or limits.multiprocessors * PREFILL_RESIDENT[shape.head_dim], 1, 1),
        32 * warps,
        (16 * warps + 4 * keys) * shape.head_dim * shape.element_bytes,
        {**shape.defines, "WARPS": warps, "KEYS": keys},
        overlaps=True,
    )


def prefill_workspace_bytes(shape: AttentionShape, launch: Launch) -> int:
    """Scratch memory of paged prefill: counters, then places for the parts of divided tiles."""
    rows = PREFILL_PLACES * launch.grid[0] * launch.threads // 2
    return 4 * MAX_ITEMS + rows * (shape.head_dim + 2) * 4


def prefill_workspace(
    workspace: torch.Tensor, shape: AttentionShape, launch: Launch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(partial, partial sums, counters, places): views of a workspace, see `split_workspace`, and a number."""
    outputs, sums, counters = _split(workspace, shape, prefill_workspace_bytes(shape, launch))
    return outputs, sums, counters, PREFILL_PLACES * launch.grid[0]


STORE_THREADS = 128


def store_launch(shape: AttentionShape, tokens: int) -> Launch:
    """Launch of the KV store for `tokens` rows. Small blocks, and one piece a thread: measured on an H100 for 4,096
    tokens, 14.3 us; 256 threads 14.8, 512 18.3; two pieces 16.2, four 16.0 (cudaMemcpy of as many bytes 12.5)."""
    pieces = tokens * shape.kv_heads * shape.head_dim * shape.element_bytes // 16
    grid = (max(1, -(-pieces // STORE_THREADS)), 1, 1)
    return Launch("kv_store.cu", "kv_store", grid, STORE_THREADS, 0, shape.defines, True)


def move_launch(blocks: int, block_bytes: int, limits: DeviceLimits | None = None) -> Launch:
    """Launch of the block mover: enough thread blocks to fill the GPU, and 16 KB or more for each."""
    limits = limits or DeviceLimits()
    by_size = -(-block_bytes // 16384)
    wanted = -(-16 * limits.multiprocessors // max(1, blocks))
    return Launch("move_blocks.cu", "move_blocks", (max(1, min(by_size, wanted)), blocks, 1), 256)


@dataclass(frozen=True)
class RowsTuning:
    """Constants of `cuda/few_rows.cu`: warps a block, turns that W and x are asked for ahead, tiles of 16 rows."""

    warps: int
    ahead: int
    x_ahead: int
    row_tiles: int


# By the most rows of x. Measured on an H100 over all products of Qwen3-8B in one graph, ms (cuBLAS, reading at the
# measured bandwidth 5.1): 5.1 (5.8) for 8 rows, 5.3 (5.9) for 16, 5.6 (5.9) for 32, 8.5 (6.0) for 64. Between the other
# kernels of a step 32 rows lose their lead: x no longer stays in the caches.
ROWS_TUNINGS = {
    8: RowsTuning(8, 6, 6, 1),
    16: RowsTuning(8, 4, 4, 1),
    32: RowsTuning(4, 4, 4, 1),
    64: RowsTuning(4, 4, 0, 2),
}
MOST_FEW_ROWS = 16  # the kernel takes 64, but `some_rows` and cuBLAS are faster then
ROWS_TURN = 32


def few_rows_fits(dtype: torch.dtype, rows: int, n: int, k: int) -> bool:
    """True if `few_rows_launch` takes such a product."""
    if dtype not in (torch.float16, torch.bfloat16) or not 1 <= rows <= max(ROWS_TUNINGS):
        return False
    return n % 32 == 0 and k % ROWS_TURN == 0


def few_rows_launch(
    dtype: torch.dtype, rows: int, n: int, k: int, tuning: RowsTuning | None = None
) -> Launch:
    """Launch of y [rows, n] = x [rows, k] times the transpose of W [n, k].

    Raises KernelArgumentError unless `few_rows_fits`.
    """
    if not few_rows_fits(dtype, rows, n, k):
        raise KernelArgumentError(
            f"few_rows takes float16 or bfloat16, 1 to {max(ROWS_TUNINGS)} rows, n and k in multiples of 32; got "
            f"{dtype}, rows={rows}, n={n}, k={k}: use torch.nn.functional.linear"
        )
    columns = next(c for c in ROWS_TUNINGS if rows <= c)
    chosen = tuning or ROWS_TUNINGS[columns]
    defines = {
        "ELEMENT": ELEMENTS[dtype], "COLUMNS": columns, "WARPS": chosen.warps, "AHEAD": chosen.ahead,
        "X_AHEAD": chosen.x_ahead, "ROW_TILES": chosen.row_tiles,
    }  # fmt: skip
    grid = (n // (16 * chosen.row_tiles), 1, 1)
    return Launch("few_rows.cu", "few_rows", grid, 32 * chosen.warps, 0, defines, overlaps=True)


@dataclass(frozen=True)
class TileTuning:
    """Constants of `cuda/some_rows.cu`: rows of W a block, slices in shared memory, blocks that share a tile's k."""

    tile: int
    stages: int
    cluster: int

    def shared_bytes(self, columns: int) -> int:
        """A block's dynamic shared memory."""
        return self.stages * (self.tile + columns) * SOME_ROWS_TURN * 2


SOME_COLUMNS = (32, 48, 64)
MOST_ROWS = SOME_COLUMNS[-1]
SOME_ROWS_TURN = 128
CLUSTERS = (1, 2, 3, 4)


def some_rows_fits(dtype: torch.dtype, rows: int, n: int, k: int) -> bool:
    """True if `some_rows_launch` takes such a product."""
    if dtype not in (torch.float16, torch.bfloat16) or not 1 <= rows <= SOME_COLUMNS[-1]:
        return False
    return n % 16 == 0 and k % SOME_ROWS_TURN == 0


def some_rows_tuning(n: int, limits: DeviceLimits) -> TileTuning:
    """The constants for a product: as few blocks a tile as give some seven in ten multiprocessors work.

    Measured on an H100 over all products of Qwen3-8B in one graph, with a small kernel before each (0.2 ms of it), ms
    (cuBLAS): 5.30 (6.32) for 32 rows, 5.47 (6.45) for 64. Two blocks a multiprocessor of half the stages, and more
    blocks a tile instead: 5.37, 5.66; tiles of 128 rows 5.57, 5.82; warps' products instead of a warpgroup's, at best:
    5.60, 6.17.
    """
    tiles = -(-n // 64)
    cluster = next((c for c in CLUSTERS if 10 * c * tiles >= 7 * limits.multiprocessors), CLUSTERS[-1])
    return TileTuning(64, 6, cluster)


def some_rows_launch(
    dtype: torch.dtype,
    rows: int,
    n: int,
    k: int,
    limits: DeviceLimits | None = None,
    tuning: TileTuning | None = None,
) -> Launch:
    """Launch of y [rows, n] = x [rows, k] times the transpose of W [n, k].

    Raises KernelArgumentError unless `some_rows_fits`.
    """
    if not some_rows_fits(dtype, rows, n, k):
        raise KernelArgumentError(
            f"some_rows takes float16 or bfloat16, 1 to {SOME_COLUMNS[-1]} rows, n in multiples of 16, k of "
            f"{SOME_ROWS_TURN}; got {dtype}, rows={rows}, n={n}, k={k}: use torch.nn.functional.linear"
        )
    columns = next(c for c in SOME_COLUMNS if rows <= c)
    chosen = tuning or some_rows_tuning(n, limits or DeviceLimits())
    defines = {
        "ELEMENT": ELEMENTS[dtype], "COLUMNS": columns, "TILE_N": chosen.tile, "BK": SOME_ROWS_TURN,
        "STAGES": chosen.stages, "CLUSTER": chosen.cluster,
    }  # fmt: skip
    grid = (-(-n // chosen.tile) * chosen.cluster, 1, 1)
    return Launch(
        "some_rows.cu", "some_rows", grid, 128, chosen.shared_bytes(columns), defines, overlaps=True
    )


def top_p_launch(rows: int, warps: int = 32) -> Launch:
    """Launch of the search for top_p's threshold: a block for each row."""
    return Launch("top_p.cu", "top_p", (rows, 1, 1), 32 * warps, 0, {"WARPS": warps})
