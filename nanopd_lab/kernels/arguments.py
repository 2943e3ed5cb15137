"""From Python arguments to kernel parameters: arrays become pointers, numbers become scalars.

Shared by the emulator and the GPU path, so that both refuse the same things with the same words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanopd_lab.kernels.errors import KernelArgumentError

MAX_THREADS = 1024
MAX_SHARED_BYTES = 227 * 1024  # of a block on Hopper; an A100 allows 163 KiB
GUARD_BYTES = 1 << 16


@dataclass(frozen=True)
class Uninitialised:
    """An output array that nobody has written: the emulator reports a kernel that reads it first."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass
class Region:
    """Memory that a kernel may touch. When guarded it is a copy with a moat around it."""

    address: int
    nbytes: int
    initialised: bool
    keep: list[Any] = field(default_factory=list)
    origin: int | None = None

    def copy_back(self) -> None:
        """Bring what the kernel wrote to the caller's array."""
        if self.origin is not None and self.nbytes:
            ctypes.memmove(self.origin, self.address, self.nbytes)


@dataclass(frozen=True)
class Slot:
    """One kernel parameter: kind p, i or f; its value or address; the array it came from."""

    kind: str
    value: float | int
    array: Any = None


def flat_launch_shape(
    grid: int | Sequence[int], block: int | Sequence[int], shared_bytes: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """`grid` and `block` as three numbers each; KernelArgumentError beyond what a GPU launches."""
    shapes = []
    for name, value in (("grid", grid), ("block", block)):
        given = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
        if not 1 <= len(given) <= 3 or any(v < 1 for v in given):
            raise KernelArgumentError(f"{name}={value!r}: give one to three numbers, each at least 1")
        shapes.append(given + (1,) * (3 - len(given)))
    threads = int(np.prod(shapes[1]))
    if threads > MAX_THREADS:
        raise KernelArgumentError(f"block={block!r} has {threads} threads; a block has at most {MAX_THREADS}")
    if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
        raise KernelArgumentError(
            f"shared_bytes={shared_bytes}: a block has at most {MAX_SHARED_BYTES} bytes"
        )
    return shapes[0], shapes[1]  # type: ignore[return-value]


def _span(array: Any) -> tuple[int, int, int]:
    """(start of the memory, its bytes, offset of the first element) of a numpy array or torch tensor."""
    if isinstance(array, np.ndarray):
        if not array.flags.c_contiguous:
            raise KernelArgumentError("a numpy array must be C-contiguous; pass np.ascontiguousarray(array)")
        return array.ctypes.data, array.nbytes, 0
    storage = array.untyped_storage()
    return storage.data_ptr(), storage.nbytes(), array.storage_offset() * array.element_size()


def _guarded(start: int, nbytes: int) -> tuple[int, Any]:
    memory = np.zeros(nbytes + 2 * GUARD_BYTES + 256, np.uint8)
    inside = memory.ctypes.data + GUARD_BYTES
    inside += -inside % 256  # as cudaMalloc aligns
    if nbytes:
        ctypes.memmove(inside, start, nbytes)
    return inside, memory


def bind(
    args: Sequence[Any], kinds: str, sizes: Sequence[int], name: str, guarded: bool
) -> tuple[list[Slot], list[Region]]:
    """Match `args` with a kernel's parameters. A strided torch view passes its whole storage, once."""
    if len(args) != len(kinds):
        raise KernelArgumentError(f"{name} takes {len(kinds)} arguments, {len(args)} were given")
    slots: list[Slot] = []
    regions: list[Region] = []
    index_of: dict[int, int] = {}
    for position, (arg, kind, size) in enumerate(zip(args, kinds, sizes, strict=True)):
        fresh = isinstance(arg, Uninitialised)
        array = np.full(arg.shape, 0, arg.dtype) if isinstance(arg, Uninitialised) else arg
        is_array = isinstance(array, np.ndarray) or hasattr(array, "untyped_storage")
        if is_array != (kind == "p"):
            wanted = {"p": "an array", "i": "an integer", "f": "a float"}[kind]
            raise KernelArgumentError(
                f"argument {position} of {name} must be {wanted}, not {type(arg).__name__}"
            )
        if not is_array:
            if kind == "i" and not isinstance(arg, int | np.integer):
                raise KernelArgumentError(f"argument {position} of {name} must be an integer, not {arg!r}")
            if kind == "i" and not -(1 << 8 * size - 1) <= int(arg) < 1 << 8 * size:
                raise KernelArgumentError(f"argument {position} of {name}: {arg} doesn't fit in {size} bytes")
            slots.append(Slot(kind, arg))
            continue
        start, nbytes, offset = _span(array)
        if not nbytes:  # an empty array is a null pointer, as torch has it
            slots.append(Slot("p", 0, array))
            continue
        if start not in index_of:
            index_of[start] = len(regions)
            if guarded:
                inside, memory = _guarded(start, nbytes)
                regions.append(Region(inside, nbytes, not fresh, [memory, array], start))
            else:
                regions.append(Region(start, nbytes, not fresh, [array]))
        slots.append(Slot("p", regions[index_of[start]].address + offset, array))
    return slots, regions
