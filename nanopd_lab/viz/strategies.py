"""How routing strategies look: the same colour, mark and line in every figure, and never the colour alone."""

from __future__ import annotations

import re
from typing import NamedTuple

from nanopd_lab.viz.style import FAINT, INK


class Look(NamedTuple):
    """Of a strategy; `line` is of matplotlib, `label` for people."""

    colour: str
    marker: str
    line: str
    label: str


_LOOKS = {
    "collocated": Look("#56B4E9", "s", "-", "collocated"),
    "disaggregated": Look("#CC79A7", "o", "--", "disaggregated"),
    "adaptive": Look("#009E73", "D", "-.", "adaptive"),
    "round-robin": Look("#E69F00", "^", ":", "round-robin"),
    "least-loaded": Look("#0072B2", "v", "-", "least-loaded"),
    "threshold": Look("#D55E00", "P", "--", "threshold"),
    "nanopd": Look("#7F7F7F", "X", "-.", "nanoPD's rule"),
    "oracle": Look(INK, "*", ":", "oracle (hindsight)"),
}
_SHAPE = re.compile(r"(\d+)p(\d+)d")


def look_of(policy: str) -> Look:
    """Of a policy by name. All xPyD are disaggregated: one colour, and a label that says the numbers."""
    if match := _SHAPE.fullmatch(policy):
        look = _LOOKS["disaggregated"]
        return look._replace(label=f"disaggregated {match[1]}P{match[2]}D")
    base = policy.split(":")[0]
    if base in _LOOKS:
        look = _LOOKS[base]
        return look if base == policy else look._replace(label=policy)
    family = next((name for name in _LOOKS if base.startswith(name + "-")), None)
    return _LOOKS[family]._replace(label=policy) if family else Look(FAINT, "h", ":", policy)


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
