"""What fleets are made of here, and what they are asked: H100s with Qwen3-8B, requests as Azure's coding trace has."""

from __future__ import annotations

from dataclasses import dataclass

from nanopd_lab.cost.hardware import load_model
from nanopd_lab.router import Outlook, Policy, Role, Slo, create_policy
from nanopd_lab.router.veil import Veiled
from nanopd_lab.sim.config import SimConfig
from nanopd_lab.sim.shard import MakePolicy
from nanopd_lab.sim.timing import CostTime
from nanopd_lab.sim.workload import AZURE_CODE_LIKE, AZURE_LIKE, SimRequest, poisson_arrivals

COST_MODEL = "h100-qwen3-8b"
SLO = Slo(ttft_s=0.5, tpot_s=0.05)
WORKLOADS = {"code": AZURE_CODE_LIKE, "conversation": AZURE_LIKE}
NUM_BLOCKS = 20_000


@dataclass(frozen=True)
class Gpu:
    """A worker of a fleet."""

    time: CostTime
    config: SimConfig
    outlook: Outlook

    @classmethod
    def load(cls, cost_model: str = COST_MODEL, slo: Slo = SLO) -> Gpu:
        """By a fitted cost model's name. Raises ValueError as `load_model`, or if it has no link."""
        cost = load_model(cost_model)
        if cost.transfer is None:
            raise ValueError(
                f"cost model {cost_model!r} has no link; take {COST_MODEL!r}, or another one of a GPU"
            )
        config = SimConfig(
            num_blocks=NUM_BLOCKS,
            max_num_seqs=256,
            block_bytes=int(cost.fit["block_bytes"]),
            link=cost.transfer,
            ahead=True,
        )
        return cls(CostTime(cost.iteration), config, Outlook.of(cost, slo))

    def policies(self, name: str) -> PolicyMaker:
        """Makes policies of a name for any number of workers."""
        return PolicyMaker(name, self.outlook)


@dataclass(frozen=True)
class PolicyMaker:
    """`half` is static, as many workers that prefill as that decode; else a name as of `create_policy`."""

    name: str
    outlook: Outlook

    def __call__(self, workers: int) -> MakePolicy:
        """For so many workers."""
        half = workers // 2
        name = f"{half}p{workers - half}d" if self.name == "half" else self.name

        def make() -> tuple[Policy, list[Role]]:
            policy, roles = create_policy(name, workers, self.outlook)
            return Veiled(policy), roles

        return make


def requests_of(workload: str, rate: float, seconds: float, seed: int) -> list[SimRequest]:
    """Poisson arrivals of a workload of WORKLOADS, `rate` a second for so long."""
    if workload not in WORKLOADS:
        raise ValueError(f"workload {workload!r}; choose one of {', '.join(WORKLOADS)}")
    return poisson_arrivals(max(1, round(rate * seconds)), rate, WORKLOADS[workload], seed)
