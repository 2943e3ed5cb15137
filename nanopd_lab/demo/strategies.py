"""The strategies of the demo by name, for the cluster and for the simulator.

Those that estimate times are veiled in both: the benchmark asks for outputs of a known length, and a policy that saw it
would know what no server does.
"""

from __future__ import annotations

from nanopd_lab.cost.files import CostModel
from nanopd_lab.router import Outlook, Policy, Role, Slo, create_policy, needs_outlook
from nanopd_lab.router.registry import ESTIMATING
from nanopd_lab.router.veil import Veiled

ADAPTIVE = "adaptive"


def routing(
    name: str, workers: int, cost: CostModel, slo: Slo, max_num_batched_tokens: int
) -> tuple[Policy, list[Role]]:
    """The policy and the workers' roles. Raises ValueError: as of `create_policy`."""
    policy, roles = create_policy(name, workers, Outlook.of(cost, slo, max_num_batched_tokens))
    return (Veiled(policy), roles) if needs_outlook(name) else (policy, roles)


def cluster_policy(
    name: str, workers: int, cost: CostModel, slo: Slo, max_num_batched_tokens: int
) -> str | Policy:
    """For `ClusterConfig`: static ones by name, which brings their roles. Raises ValueError: as of `create_policy`."""
    if not needs_outlook(name):
        return name
    return routing(name, workers, cost, slo, max_num_batched_tokens)[0]


def default_policies(split: str) -> tuple[str, ...]:
    """Collocated, disaggregated, and what chooses by itself if there is such a policy."""
    return ("collocated", split, *((ADAPTIVE,) if ADAPTIVE in ESTIMATING else ()))
