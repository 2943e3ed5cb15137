"""Policies by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from nanopd_lab.router.adaptive import Adaptive
from nanopd_lab.router.nanopd_rule import NanoPDRule
from nanopd_lab.router.outlook import Outlook
from nanopd_lab.router.pair_rule import ByEstimate
from nanopd_lab.router.policy import Policy, Role
from nanopd_lab.router.static import Collocated, Disaggregated, LeastLoaded, RoundRobin
from nanopd_lab.router.threshold import Threshold

POLICIES: dict[str, Callable[[], Policy]] = {
    "collocated": Collocated,
    "disaggregated": Disaggregated,
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "threshold": Threshold,
}
"""Those that look at queues and lengths only."""

ESTIMATING: dict[str, Callable[[Outlook], Policy]] = {
    "nanopd": NanoPDRule.of,
    "first-fit": ByEstimate,
    "adaptive": Adaptive,
}
"""Those that need to know how long things take."""

PUBLISHED = re.compile(r"nanopd-(.+)")


def needs_outlook(name: str) -> bool:
    """True if `create_policy` refuses this name without an outlook."""
    return name in ESTIMATING


def create_policy(name: str, num_workers: int, outlook: Outlook | None = None) -> tuple[Policy, list[Role]]:
    """The policy and the workers' roles.

    Args:
        name: one of POLICIES or ESTIMATING, static xPyD such as "1p2d", a threshold in tokens such as "threshold-512",
            or "nanopd-rtx-4090" and "nanopd-h20": nanoPD's rule with the parameters that it ships
        outlook: what policies that estimate need; those that look at queues only do without

    Raises:
        ValueError: an unknown name, numbers that don't add up to `num_workers`, or no outlook where one is needed.
    """
    if match := re.fullmatch(r"(\d+)p(\d+)d", name):
        prefills, decodes = int(match[1]), int(match[2])
        if prefills < 1 or decodes < 1 or prefills + decodes != num_workers:
            others = f"policy='1p{num_workers - 1}d'" if num_workers > 1 else "policy='collocated'"
            raise ValueError(
                f"policy {name!r} needs {prefills} + {decodes} workers, at least one of each, and there are "
                f"{num_workers}; set workers={max(prefills, 1) + max(decodes, 1)}, or for example {others}"
            )
        return Disaggregated(), [Role.PREFILL] * prefills + [Role.DECODE] * decodes
    if match := re.fullmatch(r"threshold(?:-(\d+))?", name):
        return Threshold(int(match[1])) if match[1] else Threshold(), Threshold.roles(num_workers)
    mixed = [Role.MIXED] * num_workers
    if match := PUBLISHED.fullmatch(name):
        return NanoPDRule.published(match[1]), mixed
    if name in ESTIMATING:
        if outlook is None:
            raise ValueError(
                f"policy {name!r} estimates times, and no cost model is given; name one (cost_model=...), or choose "
                f"one of {', '.join(POLICIES)}"
            )
        return ESTIMATING[name](outlook), mixed
    if name not in POLICIES:
        raise ValueError(
            f"unknown policy {name!r}; choose xPyD (as 1p2d) or one of {', '.join([*POLICIES, *ESTIMATING])}"
        )
    if name == "disaggregated" and num_workers < 2:
        raise ValueError("policy 'disaggregated' needs 2 workers or more, and there is 1; set workers=2")
    return POLICIES[name](), mixed
