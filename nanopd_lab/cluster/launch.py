"""From a `ClusterConfig` to workers that run: on which devices, with how many threads, by which launcher."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any, NamedTuple

from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.host import WorkerHost
from nanopd_lab.cluster.inline import InlineLauncher
from nanopd_lab.cluster.launcher import WorkerLauncher
from nanopd_lab.cluster.process import ProcessStarter
from nanopd_lab.cluster.starter import Starter
from nanopd_lab.cluster.worker_loop import WorkerSpec
from nanopd_lab.router import Role

if TYPE_CHECKING:
    from nanopd_lab.transfer.registry import Choice


class Running(NamedTuple):
    """Workers that are up, and how their model reads and writes.

    tokenizer: None if it has none
    transport: tells how KV moves between the workers, and why
    """

    launcher: InlineLauncher | WorkerLauncher
    tokenizer: Any
    vocab_size: int
    transport: Callable[[], Choice]


def launch_workers(
    config: ClusterConfig, controller: Controller, roles: Seq[Role], clock: Callable[[], float]
) -> Running:
    """Start all workers, and wait until they are up.

    Raises:
        ValueError: a setting is wrong, or a worker could not be started; nothing is left running.
    """
    if config.launcher == "inline":
        return _inline(config, controller, clock)
    if config.launcher == "process":
        start = _processes(config)  # which begin to import while the tokenizer is loaded
        tokenizer, vocab_size = _vocabulary(config.model)
    else:
        tokenizer, vocab_size = _vocabulary(config.model)
        start = _actors(config, roles)
    specs = [
        WorkerSpec(
            name=name,
            config=config.engine_config(device),
            transport=config.transport,
            devices=start.devices,
            terms=config.terms,
            threads=start.threads,
            trace=config.trace,
        )
        for name, device in zip(config.names, start.devices, strict=True)
    ]
    launcher = WorkerLauncher(
        controller, start.starter, specs, config.max_restarts, config.start_timeout_s, clock
    )
    return Running(launcher, tokenizer, vocab_size, start.starter.transport)


def _inline(config: ClusterConfig, controller: Controller, clock: Callable[[], float]) -> Running:
    from nanopd_lab.cluster.build import build_host
    from nanopd_lab.transfer.registry import Choice, create_transport, resolve_transport

    devices = dict(zip(config.names, config.worker_devices(), strict=True))
    copying = config.parts.copying
    choice = (
        Choice("inproc", f"parts exchange {' and '.join(copying)}, which only it uses")
        if copying
        else resolve_transport(config.transport, list(devices.values()), one_process=True)
    )
    pools: dict[str, Any] = {}
    loaded: dict[Any, Any] = {}  # by device
    lives: dict[str, int] = {}

    def start(name: str) -> WorkerHost:
        lives[name] = lives.get(name, -1) + 1
        device = devices[name]
        transport = create_transport(
            choice.name, devices=list(devices.values()), one_process=True, pools=pools, **copying
        )
        host, loaded[device] = build_host(
            name, config.engine_config(str(device)), transport, config.terms, life=lives[name],
            trace=config.trace, loaded=loaded.get(device), clock=clock, parts=config.parts,
        )  # fmt: skip
        return host

    launcher = InlineLauncher(controller, start, config.names, clock, config.max_restarts)
    model = next(iter(loaded.values()))
    return Running(launcher, model.tokenizer, model.geometry.vocab_size, lambda: choice)


class _Start(NamedTuple):
    """Who starts workers, on which devices, with how many threads each."""

    starter: Starter
    devices: tuple[str, ...]
    threads: int | None


def _processes(config: ClusterConfig) -> _Start:
    from nanopd_lab.transfer.registry import check_transport

    devices = config.worker_devices()
    check_transport(config.transport, devices)
    threads = config.worker_threads() if devices[0].type == "cpu" else config.threads
    names = tuple(map(str, devices))
    return _Start(ProcessStarter(names, config.transport), names, threads)


def _actors(config: ClusterConfig, roles: Seq[Role]) -> _Start:
    from nanopd_lab.cluster.ray_launcher import RayStarter
    from nanopd_lab.transfer.registry import check_transport

    check_transport(config.transport, [])  # the name; what it joins is known when the workers are placed
    kinds = {device.partition(":")[0] for device in config.devices or ()}
    threads = config.worker_threads() if config.ray.address is None else config.threads or 1
    starter = RayStarter(config.ray, config.names, roles, kinds, threads)
    return _Start(starter, ("cpu",) * config.workers, threads)  # a worker's device is where Ray puts it


def _vocabulary(model: str) -> tuple[Any, int]:
    """The tokenizer, or None, and the number of tokens, without loading weights."""
    from nanopd_lab.model.loading import load_tokenizer, read_config, resolve_folder
    from nanopd_lab.model.shapes import shape_config

    if model.startswith("random:"):
        return None, int(shape_config(model.removeprefix("random:")).vocab_size)
    path = resolve_folder(model)
    return load_tokenizer(path), int(read_config(path, model).vocab_size)
