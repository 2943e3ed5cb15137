"""The strategies of the demo by name, for the cluster and for the simulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopd_lab.router import POLICIES, Policy, Role, Slo, create_policy

if TYPE_CHECKING:
    from nanopd_lab.demo.plan import Machine

ADAPTIVE = "adaptive"


def simulated_policy(name: str, machine: Machine, slo: Slo) -> tuple[Policy, list[Role]]:
    """For the simulator. Raises ValueError: as of `create_policy`."""
    return create_policy(name, machine.workers)


def cluster_settings(name: str, cost_model: Path, slo: Slo) -> dict[str, Any]:
    """What a cluster must be told for a policy, beside its name."""
    return {}


def default_policies(split: str) -> tuple[str, ...]:
    """Collocated, disaggregated, and what chooses by itself if there is such a policy."""
    return ("collocated", split, *((ADAPTIVE,) if ADAPTIVE in POLICIES else ()))
