"""Where the files beside the code are: the kernels in `cuda/` and the data in `data/`.

In a checkout they lie at the top level, where people read them; the wheel carries the same files inside
the package.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    for candidate in (_PACKAGE / f"_{name}", _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"nanopd_lab's {name}/ folder is missing beside {_PACKAGE}; reinstall the package (pip install nanopd-lab)"
    )


def cuda_dir() -> Path:
    """Folder of the CUDA sources and the emulator header."""
    return _folder("cuda")


def data_dir() -> Path:
    """Folder of prompts, hardware parameters and recorded measurements."""
    return _folder("data")
