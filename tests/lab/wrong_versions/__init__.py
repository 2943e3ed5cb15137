"""Plausible mistakes. Each must FAIL at its check, with a message from which one sees what is wrong.

One module a concept, like `lab/exercises/`. Its WRONG maps an exercise to pairs (implementation, words that its
report must contain); its RIGHT holds independently written versions that must pass: a check may not insist on
one way of writing.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from tests.lab.wrong_versions.base import Version

_concepts = [
    import_module(f"{__name__}.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name != "base"
]
WRONG: dict[str, list[tuple[Version, str]]] = {k: v for c in _concepts for k, v in c.WRONG.items()}
RIGHT: dict[str, list[Version]] = {k: v for c in _concepts for k, v in c.RIGHT.items()}
