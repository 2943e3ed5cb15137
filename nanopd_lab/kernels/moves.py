"""Moves whole blocks between pools of one device or two: one launch, however many blocks.

copy_blocks    within a pool           gather_blocks    out of it, into one piece
pull_blocks    from another pool       scatter_blocks   from one piece, into it
"""

from __future__ import annotations

import ctypes

import torch

from nanopd_lab.kernels import gpu, validate
from nanopd_lab.kernels.errors import KernelArgumentError
from nanopd_lab.kernels.launches import move_launch


def _block_bytes(kv_cache: torch.Tensor) -> int:
    if not kv_cache.is_contiguous() or kv_cache.data_ptr() % 16:
        raise KernelArgumentError(
            "kv_cache must be the whole, contiguous block-major cache, 16-byte aligned; not one layer's view"
        )
    size = kv_cache.element_size() * (kv_cache.numel() // max(1, kv_cache.shape[0]))
    if size % 16:
        raise KernelArgumentError(f"a block of {size} bytes is not a multiple of 16 bytes")
    return size


def _reaches(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether a kernel on the target's device can read the source."""
    if source.device == target.device:
        return True
    return source.is_cuda and torch.cuda.can_device_access_peer(target.device, source.device)


def _move(
    source: torch.Tensor,
    from_ids: torch.Tensor | None,
    target: torch.Tensor,
    to_ids: torch.Tensor | None,
    count: int,
) -> None:
    size = _block_bytes(source)
    if size != _block_bytes(target) or source.dtype != target.dtype or not _reaches(target, source):
        raise KernelArgumentError(
            f"blocks must have the same size and type, on one device or one with access to the other: "
            f"{source.dtype} {list(source.shape)} on {source.device}, {target.dtype} {list(target.shape)} on "
            f"{target.device}"
        )
    for name, ids in (("from_ids", from_ids), ("to_ids", to_ids)):
        if ids is not None:
            validate.check_index(name, ids, torch.int64, 1, target.device)
            if ids.shape[0] != count:
                raise KernelArgumentError(f"{name} has {ids.shape[0]} entries for {count} blocks")
    pieces = size // 16
    for first in range(0, count, 65535):  # the grid's second dimension
        part = slice(first, min(count, first + 65535))
        args = [
            source if from_ids is not None else source[first:], ctypes.c_longlong(pieces),
            from_ids[part] if from_ids is not None else None,
            target if to_ids is not None else target[first:], ctypes.c_longlong(pieces),
            to_ids[part] if to_ids is not None else None, pieces,
        ]  # fmt: skip
        gpu.execute(move_launch(part.stop - first, size, gpu.limits_on(target.device)), args, target.device)


def copy_blocks(kv_cache: torch.Tensor, from_ids: torch.Tensor, to_ids: torch.Tensor) -> None:
    """See `ops.copy_blocks`."""
    _move(kv_cache, from_ids, kv_cache, to_ids, from_ids.shape[0])


def gather_blocks(kv_cache: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """See `ops.gather_blocks`."""
    out = kv_cache.new_empty((ids.shape[0], *kv_cache.shape[1:]))
    _move(kv_cache, ids, out, None, ids.shape[0])
    return out


def scatter_blocks(kv_cache: torch.Tensor, ids: torch.Tensor, blocks: torch.Tensor) -> None:
    """See `ops.scatter_blocks`."""
    _move(blocks, None, kv_cache, ids, ids.shape[0])


def pull_blocks(
    to_pool: torch.Tensor, to_ids: torch.Tensor, from_pool: torch.Tensor, from_ids: torch.Tensor
) -> None:
    """See `ops.pull_blocks`."""
    with torch.cuda.device(to_pool.device):  # the launch goes to the current context
        _move(from_pool, from_ids, to_pool, to_ids, to_ids.shape[0])


class Puller:
    """`ops.pull_blocks` into one pool, for those who pull often: nothing is checked or copied before the launch.

    300 MB from another H100 take 0.85 ms, of which every 8 µs on the host are 1 %. So what all launches have in common
    is prepared once.

    Args:
        to_pool: uint8 `[num_blocks, block_bytes]`, as in `pull_blocks`; to be kept by the caller
        stream: of its device
    """

    def __init__(self, to_pool: torch.Tensor, stream: torch.cuda.Stream) -> None:
        self._block_bytes, self._limits = to_pool.shape[1], gpu.limits_on(to_pool.device)
        self._from_pool, self._from_ids, self._to_ids = (ctypes.c_void_p() for _ in range(3))
        pieces = self._block_bytes // 16
        args = [
            self._from_pool, ctypes.c_longlong(pieces), self._from_ids,
            ctypes.c_void_p(to_pool.data_ptr()), ctypes.c_longlong(pieces), self._to_ids, ctypes.c_int(pieces),
        ]  # fmt: skip
        launch = move_launch(1, self._block_bytes, self._limits)
        self._on_device = torch.cuda.device(to_pool.device)
        with self._on_device:
            kernel = gpu.load(launch, to_pool.device.index)
        self._launch = gpu.PreparedLaunch(kernel, (launch.threads, 1, 1), 0, args, stream.cuda_stream)

    def enqueue(self, from_pool: torch.Tensor, ids: torch.Tensor, count: int) -> None:
        """Pull `count` blocks of a pool like the own.

        ids: int64 in pinned memory of the host, where the kernel reads them: `count` of the own blocks, then `count`
            of the other pool's. Leave them as they are until the launch has ended.
        """
        self._from_pool.value = from_pool.data_ptr()
        self._to_ids.value = first = ids.data_ptr()
        self._from_ids.value = first + 8 * count
        with self._on_device:  # the launch goes to the current context
            self._launch.enqueue(move_launch(count, self._block_bytes, self._limits).grid)
