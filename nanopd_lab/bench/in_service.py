"""A cost model of steps in service: corrected by steps that a cluster did while it served.

A profiler repeats steps. In service a prompt comes behind a pause and finds other data in the caches, its keys and
values go to memory that nobody has touched, and the machine's memory and processor have other speeds than when it was
profiled. (135M parameters in float32 on two cores of Zen 5: a pause of a second adds 4 to 11 ms to a prompt of 112
tokens, which takes 214, untouched memory 4 ms.) So requests are served at a rate that is not asked about, and two
numbers are taken from their steps: the pace of what reads, as decode steps do, and of what computes, as prompts do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nanopd_lab.bench.parity import serve, warm_up
from nanopd_lab.bench.steps_pace import pace_of, works_of
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cost.files import CostModel
from nanopd_lab.sim.workload import SimRequest


def in_service(
    cost: CostModel, config: ClusterConfig, policies: Sequence[str], requests: Sequence[SimRequest]
) -> CostModel:
    """Start a cluster, serve two requests a worker that count nowhere, and go on as `corrected`.

    Args:
        config: its policy is not looked at; without a prefix cache
    """
    with Cluster(replace(config, policy="collocated", trace=True)) as cluster:
        warm_up(cluster, config.workers)
        return corrected(cost, cluster, policies, requests)


def corrected(
    cost: CostModel, cluster: Cluster, policies: Sequence[str], requests: Sequence[SimRequest], seed: int = 0
) -> CostModel:
    """Serve the requests by each policy and correct the model; what was found is noted in `fit`.

    Args:
        cluster: idle, and records its steps
        policies: such as need no cost model
        seed: of the prompts' tokens

    Raises:
        RequestFailedError: a request was refused or ended with an error.
        ValueError: see `pace_of`.
    """
    works = []
    for policy in policies:
        cluster.use_policy(policy)
        cluster.steps()  # those of before are thrown away
        serve(cluster, [replace(each, request_id=f"{policy}-{each.request_id}") for each in requests], seed)
        works += works_of(cluster.steps(), cost.company)
    pace = pace_of(works, cost.iteration)
    found = {"policies": list(policies), "num_prompts": len(requests), **pace._asdict()}
    return replace(cost, iteration=pace.of(cost.iteration), fit={**cost.fit, "in_service": found})
