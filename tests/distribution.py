"""Who runs which test with `-n 2 --dist loadgroup`: what shares a set-up goes to one worker, the longest begins first.

xdist's own groups do nothing under pytest 9.2: they are written to `Item._nodeid`, which is no longer read.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
# What takes a minute or more begins first: at the end it would leave the other cores idle.
LONGEST = (
    "tests/cluster/test_ray.py",
    "tests/cluster/test_ray_hosts.py",
    "tests/notebooks/test_browser.py",
    "tests/notebooks/test_learner_paths.py",
    "tests/kernels/test_compile.py",
    "tests/cluster/test_process.py",
    "tests/demo/test_demo.py",
    "tests/engine/test_embedded.py",
)
NOTEBOOK = re.compile(r"\[(\d\d_\w+)")


def rank(nodeid: str) -> int:
    """Smaller is earlier."""
    file = nodeid.split("::")[0]
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


@cache
def _has_fixtures_of_its_own(file: str) -> bool:
    text = (ROOT / file).read_text(encoding="utf-8")
    return 'scope="module"' in text or "(LauncherSuite)" in text  # whose class has them


def group(nodeid: str) -> str:
    """Tests of one group are run by one worker: a notebook's of a module, or all of a module with a set-up."""
    file = nodeid.split("::")[0]
    if not _has_fixtures_of_its_own(file):
        return nodeid
    found = NOTEBOOK.search(nodeid)
    return f"{file}[{found.group(1)}]" if found else file


class GroupScheduling(LoadScopeScheduling):
    """Hands out groups in the order of collection."""

    def __init__(self, config: Any, log: Any = None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)
