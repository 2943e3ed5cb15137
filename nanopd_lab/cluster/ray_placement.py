"""Room for the workers in a Ray cluster, and how KV moves between where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from nanopd_lab.cluster.ray_actor import Here
from nanopd_lab.cluster.ray_options import Bundles, RayOptions, bundles_for
from nanopd_lab.cluster.starter import WorkerStartError
from nanopd_lab.router import Role
from nanopd_lab.transfer import TransferError
from nanopd_lab.transfer.offers import choose_between
from nanopd_lab.transfer.registry import NETWORKED, Choice, check_transport


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
        f"{options.place_timeout_s:g} s; its {len(nodes)} node(s) ({', '.join(sorted(nodes))}) have "
        f"{_listed({name: has.get(name, 0.0) for name in takes})} in all, of which "
        f"{_listed({name: free.get(name, 0.0) for name in takes})} free. Start fewer workers, lower num_cpus or "
        "num_gpus, or add nodes"
    )


def can_move(ray: Any, options: RayOptions) -> bool:
    """True if a worker that is started again may come to another machine than the others, though all were on one."""
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return len(nodes) > 1 and options.placement != "together" and not options.nodes


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))


def transport_between(name: str, workers: Iterable[Here], movable: bool) -> Choice:
    """The transport between workers that are where they are, and why.

    Args:
        movable: a worker that is started again may come to another machine

    Raises:
        TransferError: a transport for one machine, or for other devices, and the workers are elsewhere.
    """
    workers = list(workers)
    offers = [each.offer for each in workers]
    check_transport(name, [torch.device(offer.device) for offer in offers])
    several = len({offer.host for offer in offers}) > 1
    inside, plus, between = name.partition("+")
    if name != "auto":
        if (several or movable) and not plus and inside.partition(":")[0] not in NETWORKED:
            hosts = ", ".join(sorted({each.address for each in workers}))
            raise TransferError(
                f"transport {name!r} joins workers of one machine, and these are on {hosts}, or may come to others; "
                f'choose auto or {name}+{NETWORKED[0]}, or keep them "together"'
            )
        return Choice(name, "asked for")
    choice = choose_between(offers)
    if several or not movable:
        return choice
    between = next(
        (each for each in reversed(NETWORKED) if all(each in offer.transports for offer in offers)), ""
    )
    return Choice(
        f"auto+{between}", f"{choice.reason}; {between} if one has to be started on another machine"
    )
