"""Room for the workers in a Ray cluster, and how KV moves between where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from nanopd_lab.cluster.launcher import WorkerStartError
from nanopd_lab.cluster.ray_actor import Here
from nanopd_lab.cluster.ray_options import Bundles, RayOptions, bundles_for
from nanopd_lab.router import Role
from nanopd_lab.transfer.registry import check_transport


def reserve(
    ray: Any, options: RayOptions, roles: Sequence[Role], takes: Mapping[str, float]
) -> tuple[Any, Bundles]:
    """A placement group for workers of which each takes so much, and who belongs where in it.

    Raises:
        WorkerStartError: Ray finds no room within `place_timeout_s`; nothing stays reserved.
        ValueError: see `bundles_for`.
    """
    bundles = bundles_for(options, roles, takes)
    group = ray.util.placement_group([dict(each) for each in bundles.bundles], strategy=bundles.strategy)
    try:
        if group.wait(options.place_timeout_s):
            return group, bundles
        has, free = ray.cluster_resources(), ray.available_resources()
        nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    except BaseException:
        ray.util.remove_placement_group(group)
        raise
    ray.util.remove_placement_group(group)
    where = f"on the nodes {', '.join(options.nodes)}" if options.nodes else f'placed "{options.placement}"'
    raise WorkerStartError(
        f"Ray has found no room for {len(roles)} workers with {_listed(takes)} each, {where}, within "
        f"{options.place_timeout_s:g} s; its {len(nodes)} node(s) ({', '.join(sorted(nodes))}) have {_listed(has)}, of "
        f"which {_listed({name: free.get(name, 0.0) for name in has})} is free. Start fewer workers, lower num_cpus or "
        "num_gpus, or add nodes"
    )


def _listed(resources: Mapping[str, float]) -> str:
    shown = {
        name: amount for name, amount in resources.items() if name.isidentifier() and "memory" not in name
    }
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(shown.items())) or "nothing"


def transport_of(name: str, own: Here, all_workers: Iterable[Here]) -> str:
    """The transport for one worker, given where all are.

    On one machine what was asked for; "auto" over several, or "torchdist" without an address, is torch.distributed at
    the address of the worker's node.

    Raises:
        TransferError: a transport for one machine, or for other devices, and the workers are elsewhere.
    """
    workers = list(all_workers)
    check_transport(name, [torch.device(each.device) for each in workers])
    if len({each.machine for each in workers}) == 1 and name != "torchdist":
        return name
    if name in ("auto", "torchdist"):
        return f"torchdist:{own.address}"
    if not name.startswith("torchdist:"):
        addresses = sorted({each.address for each in workers})
        raise WorkerStartError(
            f"transport {name!r} joins workers of one machine, and these are on {', '.join(addresses)}; choose auto or "
            'torchdist, or keep them "together"'
        )
    return name
