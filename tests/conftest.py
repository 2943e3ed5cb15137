"""Shared by all tests: one torch thread a worker, no time limit in properties, and who runs what when."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.distribution import GroupScheduling, rank

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A limit on an example's seconds asserts how busy the machine is.
settings.register_profile("nanopd_lab", settings(), deadline=None)
settings.load_profile("nanopd_lab")

TINY = ("tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-mistral")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    items.sort(key=lambda item: rank(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadgroup" else None
