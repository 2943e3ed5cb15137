"""Backends by name. Each is imported only when chosen, so that none is needed to import the package."""

from __future__ import annotations

import importlib.util

import torch

from nanopd_lab.attention.base import AttentionBackend

BACKENDS = ("auto", "reference", "torch", "cpu", "cuda")


def create_backend(name: str, device: torch.device) -> AttentionBackend:
    """The backend called `name`; `auto` takes the fastest that works on `device`.

    Raises:
        ValueError: unknown name, or a backend that cannot run on the device.
    """
    if name == "auto":
        from nanopd_lab.cpu import library

        if device.type == "cpu" and library.available():
            from nanopd_lab.attention.cpu import CpuBackend

            return CpuBackend()
        if (
            device.type == "cuda"
            and importlib.util.find_spec("cuda")
            and importlib.util.find_spec("cuda.core")
        ):
            name = "cuda"
        else:
            name = "torch"
    if name == "reference":
        from nanopd_lab.attention.reference import ReferenceBackend

        return ReferenceBackend()
    if name == "torch":
        from nanopd_lab.attention.torch_backend import TorchBackend

        return TorchBackend()
    if name == "cpu":
        from nanopd_lab.attention.cpu import CpuBackend

        if device.type != "cpu":
            raise ValueError(f"attention backend 'cpu' cannot run on {device}; use 'torch'")
        return CpuBackend()
    if name == "cuda":
        from nanopd_lab.attention.cuda import CudaBackend

        if device.type != "cuda":
            raise ValueError(f"attention backend 'cuda' cannot run on {device}; use 'torch'")
        return CudaBackend()
    raise ValueError(f"attention backend {name!r} is unknown; choose one of {', '.join(BACKENDS)}")
