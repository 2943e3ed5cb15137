"""Which file, which constants, which grid: everything about a launch that depends only on shapes.

Pure functions of host-known numbers, shared by the GPU path, the emulator, the tests and the bench. Nothing here looks
at a device tensor: that is what lets a launch be captured in a CUDA graph. Here are what all launches are made of and
the simple ones; attention's are in `decode_launches` and `prefill_launches`, matrix products' in `product_launches`.
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
STORE_THREADS = 128


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
    """One kernel with its constants and its launch shape.

    overlaps: it calls `wait_for_previous`, so it may begin before the kernel before it has ended
    """

    file: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    defines: Mapping[str, object] = field(default_factory=dict)
    overlaps: bool = False

    @property
    def source(self) -> str:
        """The text of the kernel's file."""
        return (cuda_dir() / self.file).read_text()


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


def top_p_launch(rows: int, warps: int = 32) -> Launch:
    """Launch of the search for top_p's threshold: a block for each row."""
    return Launch("top_p.cu", "top_p", (rows, 1, 1), 32 * warps, 0, {"WARPS": warps})
