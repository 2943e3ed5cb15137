"""What launcher "ray" can be told: which Ray, on which of its nodes, and what each worker takes there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nanopd_lab.router import Role
from nanopd_lab.settings import check_fields

PLACEMENTS = ("pack", "spread", "together", "apart")
LEAST_CPUS = 0.001  # Ray reserves no nothing


@dataclass(frozen=True)
class RayOptions:
    """See the module.

    address:   of a running Ray: "auto" for the one that this machine belongs to, or "HOST:PORT" of its head; None: one
               of our own is started, on this machine and for it only, and stopped again
    namespace: Ray's, of what is started there; None: one of its own
    placement: "pack" (on few nodes), "spread" (on many), "together" (all on one node, whichever), "apart" (all prefill
               workers on one node, all decode workers on another; the policy must give fixed roles)
    nodes:     instead of `placement`: for each worker the address of its node, as `ray status -v` shows them
    num_cpus:  that each worker takes; None: as many as it has threads, of our own Ray none
    num_gpus:  1, or less to share one; None: 1 if Ray has any, otherwise 0
    resources: further ones that each worker takes, as they were named to `ray start --resources`
    host:      address of this machine that the workers call, if it has several; None: its Ray address
    port:      on this machine that the workers call; 0: any that is free
    temp_dir:  where our own Ray keeps its sockets and logs meanwhile; None: the system's folder for such
    place_timeout_s: how long Ray may take to find room for all workers

    Raises:
        ValueError: a setting is out of range.
    """

    address: str | None = None
    namespace: str | None = None
    placement: str = "pack"
    nodes: tuple[str, ...] = ()
    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    host: str | None = None
    port: int = 0
    temp_dir: str | None = None
    place_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.resources, Mapping) or not all(
            isinstance(name, str) and isinstance(amount, (int, float))
            for name, amount in self.resources.items()
        ):
            raise ValueError(f"resources is {self.resources!r}; give names with amounts, as {{'rack1': 1}}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"address is {self.address!r}, a Ray client's: workers could not call back; start this on a machine of "
                'the cluster with address "auto", or join it with `ray start --address=HOST:PORT`'
            )
        if self.address not in (None, "auto"):
            head_of(str(self.address))
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement is {self.placement!r}; choose one of {', '.join(PLACEMENTS)}")
        if self.num_cpus is not None and self.num_cpus < 0:
            raise ValueError(f"num_cpus is {self.num_cpus}; a worker cannot take less than none")
        if self.num_gpus is not None and not 0 <= self.num_gpus <= 1:
            raise ValueError(
                f"num_gpus is {self.num_gpus}; a worker computes on one GPU, or shares it: 0 to 1"
            )
        if wrong := [name for name, amount in self.resources.items() if not amount > 0]:
            raise ValueError(f"resources: {wrong[0]} is {self.resources[wrong[0]]}; it must be positive")
        if taken := set(self.resources) & {"CPU", "GPU"}:
            raise ValueError(f"resources names {sorted(taken)[0]}; set num_cpus and num_gpus")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must lie between 0 and 65535")
        if not self.place_timeout_s > 0:
            raise ValueError(f"place_timeout_s is {self.place_timeout_s}; it must be positive")
        if self.address is not None and self.temp_dir is not None:
            raise ValueError(
                f"temp_dir is {self.temp_dir!r}, and Ray runs already at {self.address}; give it to `ray start "
                "--temp-dir` there"
            )


@dataclass(frozen=True)
class Bundles:
    """What is reserved: bundles of resources, each on one node, and which worker takes from which.

    strategy: as of Ray's placement groups
    """

    bundles: tuple[Mapping[str, float], ...]
    strategy: str
    of_worker: tuple[int, ...]


def head_of(address: str) -> tuple[str, int]:
    """Host and port. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ValueError(
            f'address is {address!r}; give "HOST:PORT" of Ray\'s head as `ray start --head` printed it, or "auto"'
        )
    return host.strip("[]"), int(port)


def bundles_for(options: RayOptions, roles: Sequence[Role], each: Mapping[str, float]) -> Bundles:
    """What to reserve for workers with these roles, of which each takes so much.

    Raises:
        ValueError: "apart", and not every worker either prefills or decodes; or nodes for another number of workers.
    """
    if options.nodes:
        if len(options.nodes) != len(roles):
            raise ValueError(f"{len(options.nodes)} nodes for {len(roles)} workers; name one for each")
        pinned = tuple({**each, f"node:{node}": LEAST_CPUS} for node in options.nodes)
        return Bundles(pinned, "SPREAD", tuple(range(len(roles))))
    if options.placement == "together":
        return Bundles((_times(each, len(roles)),), "PACK", (0,) * len(roles))
    if options.placement == "apart":
        prefilling = [role is Role.PREFILL for role in roles]
        if Role.MIXED in roles or len(set(prefilling)) < 2:
            raise ValueError(
                'placement is "apart", which parts prefill from decode workers, and the policy gives the roles '
                f'{", ".join(role.value for role in roles)}; choose a policy such as "1p1d", or "spread"'
            )
        sums = (_times(each, sum(prefilling)), _times(each, len(roles) - sum(prefilling)))
        return Bundles(sums, "STRICT_SPREAD", tuple(0 if first else 1 for first in prefilling))
    return Bundles((each,) * len(roles), options.placement.upper(), tuple(range(len(roles))))


def _times(each: Mapping[str, float], count: int) -> dict[str, float]:
    return {name: amount * count for name, amount in each.items()}


def device_of(gpu_ids: Sequence[str], visible: str | None) -> str:
    """What torch calls the GPU that Ray has given to a worker that sees all of the node's.

    Args:
        gpu_ids: as Ray names them: by number, or as `CUDA_VISIBLE_DEVICES` did when the node was started
        visible: that variable, None if it is not set
    """
    if not gpu_ids:
        return "cpu"
    names = [name.strip() for name in visible.split(",")] if visible else []
    return f"cuda:{names.index(gpu_ids[0]) if gpu_ids[0] in names else int(gpu_ids[0])}"
