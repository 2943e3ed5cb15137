"""What a version of an exercise is: anything that can be handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class CudaVersion(str):
    """A CUDA C++ source with a name, for test ids."""

    __name__: str

    def __new__(cls, name: str, source: str) -> CudaVersion:
        made = super().__new__(cls, source)
        made.__name__ = name
        return made


Version = Callable[..., Any] | CudaVersion
