"""Backends by name. Each is imported only when chosen, so that none is needed to import the package."""

from __future__ import annotations

import torch

from nanopd_lab.attention.base import AttentionBackend
from nanopd_lab.kv.cache import KVShape

DEVICES: dict[str, tuple[str, ...]] = {
    "auto": ("cpu", "cuda"),
    "reference": ("cpu", "cuda"),
    "online": ("cpu", "cuda"),
    "torch": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "cuda": ("cuda",),
}


def check_backend(name: str, device: torch.device) -> None:
    """Refuse what cannot work on the device.

    Raises:
        ValueError: unknown name, or a backend that cannot run there.
    """
    if name not in DEVICES:
        raise ValueError(f"attention backend {name!r} is unknown; choose one of {', '.join(DEVICES)}")
    if device.type not in DEVICES[name]:
        raise ValueError(f"attention backend {name!r} cannot run on {device}; use 'torch'")


def create_backend(name: str, device: torch.device, shape: KVShape, num_heads: int) -> AttentionBackend:
    """The backend called `name`; `auto` takes the fastest that works on `device` for this shape.

    Args:
        shape: of the cache that it will serve
        num_heads: query heads

    Raises:
        ValueError: see `check_backend`; or the CUDA kernels asked for by name do not support the shape.
        FileNotFoundError: the CPU backend asked for by name, and no C++ compiler.
    """
    check_backend(name, device)
    if name == "auto":
        name = _fastest(device, shape, num_heads)
    if name == "reference":
        from nanopd_lab.attention.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "online":
        from nanopd_lab.attention.online import OnlineBackend

        return OnlineBackend()
    if name == "cpu":
        from nanopd_lab.attention.cpu import CpuBackend

        return CpuBackend()
    if name == "cuda":
        from nanopd_lab.attention.cuda import CudaBackend

        backend = CudaBackend()
        backend.allocate(shape, num_heads, device)
        return backend
    from nanopd_lab.attention.torch_backend import TorchBackend

    return TorchBackend()


def _fastest(device: torch.device, shape: KVShape, num_heads: int) -> str:
    if device.type == "cpu":
        from nanopd_lab.cpu import library

        return "cpu" if library.available() else "torch"
    from nanopd_lab.kernels.gpu import can_compile

    if not can_compile():
        return "torch"
    from nanopd_lab.attention.cuda import CudaBackend

    try:
        CudaBackend.check(shape, num_heads)
    except ValueError:
        return "torch"
    return "cuda"
