"""`nanopd-lab demo`: from nothing to a report of when disaggregation pays on this machine.

profile ─► fit ─► rate, objectives ─► serve the same requests under each strategy ─► report.html
            │                                                                         ▲
            └────────────► simulate the same requests, and others ───────────────────┘
"""

from __future__ import annotations

import json

from nanopd_lab.resources import data_dir


def load_prompts() -> list[str]:
    """The questions in `data/prompts.json`, short and long."""
    found: list[str] = json.loads((data_dir() / "prompts.json").read_text())["chat"]
    return found
