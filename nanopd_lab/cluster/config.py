"""What a cluster can be told, checked before anything is loaded or started."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanopd_lab.cluster.actions import Limits
from nanopd_lab.cluster.lease import Lease, LeaseTerms
from nanopd_lab.cluster.ray_options import RayOptions, bundles_for
from nanopd_lab.cluster.worker import WorkerCore
from nanopd_lab.engine.config import EngineConfig
from nanopd_lab.router import Outlook, Policy, Role, Slo, create_policy, needs_outlook
from nanopd_lab.settings import check_fields
from nanopd_lab.transfer.packing import pack_blocks, unpack_blocks

if TYPE_CHECKING:
    import torch

LAUNCHERS = ("inline", "process", "ray")
COST_MODELS = {"smollm2": "cpu-smollm2-fp32"}  # by model, where none is named


@dataclass(frozen=True)
class ClusterParts:
    """The exchangeable parts of a cluster's workers, beside those of their engines; each default is the package's own.

    worker:       a `WorkerCore`, perhaps with another `missing`
    lease:        called with (terms, now), returns a `Lease`
    pack, unpack: how transport 'inproc' gets blocks out of one pool and into another, see `transfer.packing`
    """

    worker: type[WorkerCore] = WorkerCore
    lease: Callable[[LeaseTerms, float], Lease] = Lease
    pack: Callable[[torch.Tensor, Seq[int]], torch.Tensor] = pack_blocks
    unpack: Callable[[torch.Tensor, Seq[int], torch.Tensor], None] = unpack_blocks

    @property
    def copying(self) -> dict[str, Any]:
        """Options of 'inproc' that are not the package's own."""
        own = {"pack": (self.pack, pack_blocks), "unpack": (self.unpack, unpack_blocks)}
        return {name: mine for name, (mine, default) in own.items() if mine is not default}


_KINDS = {"limits": Limits, "terms": LeaseTerms, "ray": RayOptions, "parts": ClusterParts}


@dataclass(frozen=True)
class ClusterConfig:
    """All settings of a cluster. Settings of the workers' engines go into `engine`, by the names of `EngineConfig`.

    model:       as for `LLM`
    workers:     how many, each with an engine of its own
    policy:      "collocated", "1p2d" (any xPyD), "disaggregated", "round-robin", "least-loaded", "threshold",
                 "nanopd", "first-fit", "adaptive", or a `Policy`; see `router.create_policy`
    cost_model:  what policies that estimate times go by: a name in data/hardware, or a file of `nanopd-lab fit`; None:
                 for "smollm2" the one fitted to a CPU, otherwise none
    goodput:     what requests are promised, in ms, for example ("ttft:500", "tpot:100")
    launcher:    "process" (one process a worker), "ray" (an actor a worker, on one machine or many) or "inline" (all in
                 this thread, one after another)
    transport:   "auto", "inproc", "shm", "p2p", "pinned", "torchdist", "nixl", either with ":HOST" behind it (an
                 address of this machine to listen on), or one inside a machine and one between: "auto+nixl:HOST"
    devices:     of the workers, for example ("cuda:0", "cuda:1"); None: a GPU each, or the CPU
    share_devices: allow more workers than GPUs; they then share them
    threads:     of each worker process on a CPU; None: the cores, divided
    engine:      for example {"max_num_batched_tokens": 256}
    seed:        of random weights and of requests that bring no seed
    request_timeout_s: a request that has not finished by then ends with an error
    max_restarts: how often a worker that died is started again
    limits, terms: see there
    trace:       keep every step's begin and end, for timelines
    ray:         with launcher "ray": which Ray, where, and what each worker takes there
    parts:       exchanged parts of the workers; with launcher "inline" only

    Raises:
        ValueError: a setting is of another type, or out of range, or more workers than GPUs.
    """

    model: str
    workers: int = 2
    policy: str | Policy = "collocated"
    cost_model: str | None = None
    goodput: tuple[str, ...] = ()
    launcher: str = "process"
    transport: str = "auto"
    devices: tuple[str, ...] | None = None
    share_devices: bool = False
    threads: int | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    request_timeout_s: float = 600.0
    start_timeout_s: float = 300.0
    max_restarts: int = 3
    limits: Limits = field(default_factory=Limits)
    terms: LeaseTerms = field(default_factory=LeaseTerms)
    trace: bool = False
    ray: RayOptions = field(default_factory=RayOptions)
    parts: ClusterParts = field(default_factory=ClusterParts)

    def __post_init__(self) -> None:
        self._check_types()
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers!r}; it must be an integer of at least 1")
        if self.launcher not in LAUNCHERS:
            raise ValueError(f"launcher is {self.launcher!r}; choose one of {', '.join(LAUNCHERS)}")
        if self.launcher == "ray":
            self._check_ray()
        elif self.ray != RayOptions():
            raise ValueError(
                f'settings of Ray, and launcher is {self.launcher!r}; set launcher="ray" (--launcher ray)'
            )
        if self.launcher != "inline" and self.parts != ClusterParts():
            raise ValueError(
                f"parts are exchanged, and launcher is {self.launcher!r}: code cannot be sent to another process; set "
                'launcher="inline"'
            )
        if self.parts.copying and self.transport not in ("auto", "inproc"):
            raise ValueError(
                f"parts exchange {' and '.join(self.parts.copying)}, which only transport 'inproc' uses, and transport "
                f"is {self.transport!r}; leave it out"
            )
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; a worker needs at least 1")
        for name in ("request_timeout_s", "start_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}; it must be at least 0")
        if self.devices is not None and len(self.devices) != self.workers:
            raise ValueError(f"{len(self.devices)} devices for {self.workers} workers; give one for each")
        if unknown := set(self.engine) & {"model", "seed", "device"}:
            raise ValueError(f"engine sets {sorted(unknown)[0]!r}, which is a setting of the cluster itself")
        Slo.parse(self.goodput)
        self.engine_config("cpu")
        self.route_policy()

    def _check_types(self) -> None:
        if isinstance(self.devices, (list, tuple)):  # torch.device("cpu") has a name as well
            object.__setattr__(self, "devices", tuple(map(str, self.devices)))
        check_fields(self)
        for name, kind in _KINDS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} is {value!r}; give {kind.__name__}(...)")
        if not isinstance(self.engine, Mapping) or not all(isinstance(name, str) for name in self.engine):
            raise ValueError(
                f'engine is {self.engine!r}; give fields of EngineConfig, as {{"max_num_batched_tokens": 256}}'
            )
        if isinstance(self.policy, type):
            raise ValueError(
                f"policy is the class {self.policy.__name__}; make one: policy={self.policy.__name__}()"
            )
        named = isinstance(getattr(self.policy, "name", None), str)
        if not isinstance(self.policy, str) and not (
            named and callable(getattr(self.policy, "choose", None))
        ):
            raise ValueError(
                f'policy is {self.policy!r}; give a name, as "1p1d", or an object with a name and `choose`, see '
                "router/policy.py"
            )

    def _check_ray(self) -> None:
        numbered = [device for device in self.devices or () if ":" in device]
        if numbered:
            raise ValueError(
                f"devices names {numbered[0]!r}, and Ray gives out the GPUs; leave it out, or name 'cpu'"
            )
        if len(set(self.devices or ())) > 1:
            raise ValueError(
                f"devices are {', '.join(self.devices or ())}; all workers of Ray are on CPUs or all on GPUs"
            )
        if "cpu" in (self.devices or ()) and self.ray.num_gpus:
            raise ValueError(
                f"devices are 'cpu', and each worker takes {self.ray.num_gpus:g} GPU; leave one of them out"
            )
        if self.share_devices:
            raise ValueError("share_devices with launcher 'ray': set ray.num_gpus below 1 instead")
        bundles_for(self.ray, self.route_policy()[1], {})

    def route_policy(self) -> tuple[Policy, list[Role]]:
        """A policy to route with, and the workers' roles."""
        if isinstance(self.policy, str):
            outlook = self.outlook() if self.cost_model or needs_outlook(self.policy) else None
            return create_policy(self.policy, self.workers, outlook)
        return self.policy, [Role.MIXED] * self.workers

    def outlook(self) -> Outlook | None:
        """What policies that estimate are told; None: no cost model is named, and there is none for this model.

        Raises:
            ValueError: there is no such cost model, or an objective that cannot be read.
        """
        name = self.cost_model or COST_MODELS.get(self.model)
        if name is None:
            return None
        from nanopd_lab.cost.hardware import load_model

        tokens = self.engine_config("cpu").max_num_batched_tokens
        return Outlook.of(load_model(name), Slo.parse(self.goodput), tokens)

    @property
    def names(self) -> list[str]:
        return [f"w{number}" for number in range(self.workers)]

    def engine_config(self, device: str) -> EngineConfig:
        """Of one worker's engine."""
        try:
            return EngineConfig(self.model, seed=self.seed, device=device, **self.engine)
        except TypeError as error:
            raise ValueError(f"engine: {error}; settings are the fields of EngineConfig") from None

    def worker_devices(self) -> list[torch.device]:
        """One for each worker.

        Raises:
            ValueError: one does not exist here, or workers would share a GPU without `share_devices`.
        """
        import torch

        if self.devices is not None:
            found = [self.engine_config(device).resolve_device() for device in self.devices]
        elif torch.cuda.is_available():
            count = torch.cuda.device_count()
            found = [torch.device("cuda", number % count) for number in range(self.workers)]
        else:
            found = [torch.device("cpu")] * self.workers
        gpus = [device for device in found if device.type == "cuda"]
        if len(set(gpus)) < len(gpus) and not self.share_devices:
            raise ValueError(
                f"{len(gpus)} workers for {len(set(gpus))} GPU(s); lower workers, or let them share with "
                "share_devices=True (set kv_cache_memory_bytes in `engine`, so that their pools fit)"
            )
        return found

    def worker_threads(self) -> int:
        """Threads of each worker's CPU operators: never more than there are cores, all together."""
        if self.threads is not None:
            return self.threads
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.workers)
