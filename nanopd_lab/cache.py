"""The user's cache folder: converted models and compiled kernels. Safe to delete at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(name: str = "") -> Path:
    """A folder in the cache, made if need be; `NANOPD_LAB_CACHE` overrides where the cache is."""
    import platformdirs

    root = Path(
        os.environ.get("NANOPD_LAB_CACHE") or platformdirs.user_cache_path("nanopd_lab", appauthor=False)
    )
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
