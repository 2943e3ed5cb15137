"""Shared by all tests: one torch thread a worker, no time limit in properties, and who runs what when."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A limit on an example's seconds asserts how busy the machine is.
settings.register_profile("nanopd_lab", settings(), deadline=None)
settings.load_profile("nanopd_lab")

TINY = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral")
# What takes a minute or more begins first: at the end it would leave the other cores idle.
LONGEST = (
    "notebooks/test_browser.py",
    "notebooks/test_learner_paths.py",
    "demo/test_demo.py",
    "cluster/test_process.py",
    "engine/test_embedded.py",
)


def _rank(item: pytest.Item) -> int:
    path = item.path.as_posix()
    return next((rank for rank, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))


def _shares_setup(item: pytest.Item) -> bool:
    """True if a fixture of its module or class is among what it needs."""
    definitions = item._fixtureinfo.name2fixturedefs.values() if hasattr(item, "_fixtureinfo") else ()
    return any(found.scope in ("module", "class") for each in definitions for found in each)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    items.sort(key=_rank)
    for item in items:
        # With `--dist loadgroup` one worker gets all that would otherwise be set up by each.
        if not item.get_closest_marker("xdist_group") and _shares_setup(item):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.split("::")[0]))
