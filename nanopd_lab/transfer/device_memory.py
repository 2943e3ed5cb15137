"""GPU memory of another process, through CUDA IPC, and copies between addresses.

The driver is called through ctypes, as in `nanopd_lab.kernels.gpu`. `torch.multiprocessing` can share a CUDA tensor
too, but for one receiver: it counts references in files that a killed process leaves behind, and a second receiver of
the same handle upsets the count. Here the owner simply keeps its pool until it closes.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from nanopd_lab.transfer.base import TransferError

_DEVICE_ORDINAL = 9  # CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag there is


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


@functools.lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    pointer, address, size = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t
    library.cuMemcpyAsync.argtypes = [address, address, size, pointer]
    library.cuIpcGetMemHandle.argtypes = [pointer, address]
    library.cuIpcOpenMemHandle_v2.argtypes = [pointer, _Handle, ctypes.c_uint]
    library.cuIpcCloseMemHandle.argtypes = [address]
    library.cuMemGetAddressRange_v2.argtypes = [pointer, pointer, address]
    library.cuPointerGetAttribute.argtypes = [pointer, ctypes.c_int, address]
    library.cuGetErrorName.argtypes = [ctypes.c_int, pointer]
    return library


def _check(error: int, what: str) -> None:
    if error:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(error, ctypes.byref(name))
        raise RuntimeError(f"{what} failed: {(name.value or b'error').decode()} ({error})")


def _bind_context(device: torch.device) -> None:
    """Make the device's context current in this thread. torch's device guard does so only when the device changes."""
    torch.empty(1, device=device)  # creates it
    torch.cuda.current_stream(device).query()  # any call of the runtime binds it


def uuid_of(device: torch.device) -> str:
    """What names a GPU in every process, whichever it can see and in what order."""
    return str(torch.cuda.get_device_properties(device).uuid)


def device_of(uuid: str) -> torch.device:
    """The GPU of this name in this process.

    Raises:
        TransferError: it is not visible here.
    """
    for index in range(torch.cuda.device_count()):
        if uuid_of(torch.device("cuda", index)) == uuid:
            return torch.device("cuda", index)
    raise TransferError(
        f"the source's GPU ({uuid}) is not visible to this process, which sees {torch.cuda.device_count()}: let all "
        "workers see all GPUs (CUDA_VISIBLE_DEVICES) and give each its own device instead"
    )


def export_memory(memory: torch.Tensor) -> dict[str, Any]:
    """Details with which another process, or this one, can open a CUDA tensor's memory. JSON-ready.

    Memory that cannot be exported (torch's expandable segments, a system without CUDA IPC) can still be opened in this
    process; in others `open_memory` says why not.
    """
    details: dict[str, Any] = {
        "pid": os.getpid(),
        "pointer": memory.data_ptr(),
        "gpu": uuid_of(memory.device),
    }
    with torch.cuda.device(memory.device):
        _bind_context(memory.device)
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        try:
            # A handle stands for a whole allocation, of which torch's allocator may have given us a part.
            error = _driver().cuMemGetAddressRange_v2(
                ctypes.byref(base), ctypes.byref(size), memory.data_ptr()
            )
            _check(error, "cuMemGetAddressRange")
            _check(_driver().cuIpcGetMemHandle(ctypes.byref(handle), memory.data_ptr()), "cuIpcGetMemHandle")
        except RuntimeError as error:
            return {**details, "handle": None, "reason": str(error)}
    return {**details, "handle": bytes(handle).hex(), "offset": memory.data_ptr() - base.value}


class _Raw:
    """An address as an object that torch can look at without copying (the CUDA array interface)."""

    def __init__(self, pointer: int, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape, "typestr": "|u1", "data": (pointer, False), "strides": None, "version": 2,
        }  # fmt: skip


def open_memory(
    details: Mapping[str, Any], shape: tuple[int, int], through: torch.device
) -> tuple[torch.Tensor, Callable[[], None] | None]:
    """The memory that `export_memory` described, as uint8 of this shape, and what gives the mapping back.

    Args:
        details: from `export_memory`
        shape: `[num_blocks, block_bytes]`
        through: the device whose kernels or copies will use it: that of the memory, or one with access to it

    Raises:
        TransferError: it cannot be opened; for example its owner is dead.
    """
    if details["pid"] == os.getpid():
        return _view(details["pointer"], shape), None
    if details["handle"] is None:
        raise TransferError(
            f"the source's GPU memory cannot be shown to other processes: {details['reason']}. Leave "
            "expandable_segments and cudaMallocAsync out of PYTORCH_CUDA_ALLOC_CONF; without CUDA IPC (some virtual "
            "machines and containers) run all workers in one process"
        )
    base = ctypes.c_uint64()
    handle = _Handle.from_buffer_copy(bytes.fromhex(details["handle"]))
    with torch.cuda.device(through):
        _bind_context(through)
        try:
            error = _driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, _LAZY_PEER_ACCESS)
            _check(error, "cuIpcOpenMemHandle")
        except RuntimeError as error:
            raise TransferError(
                f"the source's GPU memory cannot be opened: {error}. Its owner may be dead: connect again when it has "
                "been restarted"
            ) from error

    def release() -> None:
        with torch.cuda.device(through):
            _bind_context(through)
            _driver().cuIpcCloseMemHandle(base)  # fails only where all is lost anyway

    return _view(base.value + details["offset"], shape), release


def _view(pointer: int, shape: tuple[int, int]) -> torch.Tensor:
    ordinal = ctypes.c_int()
    _check(
        _driver().cuPointerGetAttribute(ctypes.byref(ordinal), _DEVICE_ORDINAL, pointer),
        "cuPointerGetAttribute",
    )
    tensor = torch.as_tensor(_Raw(pointer, shape), device=torch.device("cuda", ordinal.value))
    if tensor.data_ptr() != pointer:
        raise TransferError("torch copied the source's pool instead of looking at it; please report this")
    return tensor


def can_reach(target: torch.device, source: torch.device) -> bool:
    """Whether kernels on `target` can read memory of `source`: the same GPU, or peer access (NVLink, or PCIe that lets
    GPUs talk to each other)."""
    return target == source or torch.cuda.can_device_access_peer(target, source)


def enable_peer_access(target: torch.device, source: torch.device) -> None:
    """Let kernels on `target` read memory of `source`.

    torch switches it on with the first copy between the two, for the device that it copies from, hence both ways.
    """
    if target != source:
        here, there = torch.zeros(1, device=target), torch.zeros(1, device=source)
        there.copy_(here)
        here.copy_(there)
        torch.cuda.synchronize(target)


def copy_async(target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    """Enqueue a copy between two addresses, each pinned host memory or a GPU's.

    The stream's device must be the current one.
    """
    _check(_driver().cuMemcpyAsync(target, source, num_bytes, stream.cuda_stream), "cuMemcpyAsync")
