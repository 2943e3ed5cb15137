"""How routing strategies look: the same colour, mark and line in every figure, and never the colour alone."""

from __future__ import annotations

import re
from typing import NamedTuple

from nanopd_lab.viz.style import strategy_colour


class Look(NamedTuple):
    """Of a strategy; `line` is of matplotlib, `label` for people."""

    colour: str
    marker: str
    line: str
    label: str


_LOOKS = {
    "collocated": ("s", "-", "collocated"),
    "disaggregated": ("o", "--", "disaggregated"),
    "adaptive": ("D", "-.", "adaptive"),
    "round-robin": ("^", ":", "round-robin"),
    "least-loaded": ("v", "-", "least-loaded"),
    "threshold": ("P", "--", "threshold"),
    "nanopd": ("X", "-.", "nanoPD's rule"),
    "oracle": ("*", ":", "oracle (hindsight)"),
}
_SHAPE = re.compile(r"(\d+)p(\d+)d")
_SPLITS = {1: (">", "-."), 0: ("o", "--"), -1: ("<", ":")}  # more prefill, level, more decode


def look_of(policy: str) -> Look:
    """Of a policy by name. All xPyD are disaggregated: one colour, a mark that points to the larger side, and a label
    that says the numbers."""
    colour = strategy_colour(policy)
    if match := _SHAPE.fullmatch(policy):
        prefill, decode = int(match[1]), int(match[2])
        marker, line = _SPLITS[(prefill > decode) - (prefill < decode)]
        return Look(colour, marker, line, f"disaggregated {prefill}P{decode}D")
    base = policy.split(":")[0]
    family = next((name for name in _LOOKS if base == name or base.startswith(name + "-")), None)
    if family is None:
        return Look(colour, "h", ":", policy)
    marker, line, label = _LOOKS[family]
    return Look(colour, marker, line, label if policy == family else policy)


def disaggregates(policy: str) -> bool:
    """True if every request of it has two workers."""
    return policy == "disaggregated" or _SHAPE.fullmatch(policy) is not None


def in_order(policies: set[str] | list[str]) -> list[str]:
    """Collocated first, then disaggregated, then those that choose."""
    names = list(_LOOKS)

    def place(policy: str) -> tuple[int, str]:
        base = "disaggregated" if disaggregates(policy) else policy.split(":")[0]
        found = next((n for n, name in enumerate(names) if base == name or base.startswith(name + "-")), 99)
        return found, policy

    return sorted(set(policies), key=place)
