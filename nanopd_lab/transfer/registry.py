"""Which transport serves a set of workers, and why."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanopd_lab.transfer.base import Pool, TransferError, Transport

TRANSPORTS = ("inproc", "shm", "p2p", "pinned", "torchdist", "nixl")
NETWORKED = ("torchdist", "nixl")  # between machines; may be followed by ":HOST"


@dataclass(frozen=True)
class Choice:
    """A transport by name, and the reason for people."""

    name: str
    reason: str


def choose_transport(devices: Sequence[torch.device | str], one_process: bool = False) -> Choice:
    """The fastest transport that serves all of these workers.

    Args:
        devices: of every worker that will pull or be pulled from. All workers must come to the same choice, so each
            gives all of them.
        one_process: all workers live in this process

    Raises:
        TransferError: CPU and GPU workers in different processes.
    """
    kinds = {torch.device(device).type for device in devices}
    if "cuda" in kinds and not torch.cuda.is_available():
        raise TransferError("workers on GPUs, but torch sees none here; use device 'cpu'")
    found = [_indexed(torch.device(device)) for device in devices]
    if kinds <= {"cpu"}:
        if one_process:
            return Choice(
                "inproc", "all workers are in this process, on CPUs: blocks are copied where they are"
            )
        return Choice("shm", "the workers are processes on CPUs: pools lie in shared memory")
    if kinds != {"cuda"}:
        if one_process:
            return Choice(
                "inproc", f"{' and '.join(sorted(kinds))} workers in one process: torch copies between them"
            )
        raise TransferError(
            f"no transport joins workers on {' and '.join(sorted(kinds))} in different processes; put all of them on "
            "GPUs or all on CPUs"
        )
    if len(set(found)) == 1:
        return Choice("p2p", f"all workers share {found[0]}: blocks are copied inside its memory")
    for target in found:
        for source in found:
            if target != source and not torch.cuda.can_device_access_peer(target, source):
                return Choice(
                    "pinned",
                    f"{target} cannot read {source}'s memory: blocks are relayed through pinned host memory",
                )
    return Choice(
        "p2p", "every GPU can read every other's memory (peer access): the reader's copies directly"
    )


def default_transports(source: torch.device, target: torch.device) -> tuple[str, ...]:
    """Those that work between these devices."""
    from nanopd_lab.transfer.device_memory import can_reach

    if target.type == "cpu":
        return ("inproc", "shm")
    return ("p2p", "pinned") if can_reach(target, source) else ("pinned",)


def resolve_transport(name: str, devices: Sequence[torch.device | str], one_process: bool = False) -> Choice:
    """What a transport that is asked for by name comes to, see `choose_transport`."""
    return choose_transport(devices, one_process) if name == "auto" else Choice(name, "asked for")


def create_transport(
    name: str = "auto",
    devices: Sequence[torch.device | str] = ("cpu",),
    one_process: bool = False,
    pools: MutableMapping[str, Pool] | None = None,
    **options: Any,
) -> Transport:
    """A transport for one worker.

    Args:
        name: one of `TRANSPORTS`, or "auto" for what `choose_transport` says; "torchdist:HOST" listens at that address
            of this machine instead of loopback; "auto+nixl:HOST" is one inside a machine and one between machines
        devices: of all workers; for "auto"
        one_process: all workers live in this process; for "auto"
        pools: for 'inproc', which needs it: the mapping that all workers of the process share
        options: of the transport's constructor; with a +, that of the one between machines, and `host_identity`, for
            those who are not to share memory though they could

    Raises:
        TransferError: unknown name, or 'inproc' without `pools`.
    """
    inside, plus, between = name.partition("+")
    if plus:
        from nanopd_lab.transfer.mixed import MixedTransport
        from nanopd_lab.transfer.offers import host_identity

        host = options.pop("host_identity", host_identity())
        return MixedTransport(
            create_transport(inside, devices, one_process, pools),
            create_transport(between, shared_tables=False, **options),
            host,
        )
    name = resolve_transport(name, devices, one_process).name
    # Imported when asked for: who has no GPU need not load what drives one.
    if name == "inproc":
        from nanopd_lab.transfer.inproc import InprocTransport

        if pools is None:
            raise TransferError(
                "'inproc' finds pools in a mapping: give all workers of the process the same `pools`"
            )
        return InprocTransport(pools, **options)
    if name == "shm":
        from nanopd_lab.transfer.shm import ShmTransport

        return ShmTransport(**options)
    if name == "p2p":
        from nanopd_lab.transfer.p2p import P2PTransport

        return P2PTransport(**options)
    if name == "pinned":
        from nanopd_lab.transfer.pinned import PinnedTransport

        return PinnedTransport(**options)
    if name.partition(":")[0] == "torchdist":
        from nanopd_lab.transfer.torchdist import TorchDistTransport

        return TorchDistTransport(**_host_of(name), **options)
    if name.partition(":")[0] == "nixl":
        from nanopd_lab.transfer.nixl import NixlTransport

        return NixlTransport(**_host_of(name), **options)
    raise TransferError(f"unknown transport {name!r}; choose from auto, {', '.join(TRANSPORTS)}")


def check_transport(name: str, devices: Sequence[torch.device]) -> None:
    """Before worker processes are started: one that cannot serve them.

    Raises:
        TransferError: an unknown name, or a transport for other memory than theirs.
    """
    inside, plus, between = name.partition("+")
    if plus:
        if between.partition(":")[0] not in NETWORKED or inside.partition(":")[0] in NETWORKED:
            raise TransferError(
                f"transport {name!r}: in front of the + stands one inside a machine (auto, shm, p2p, pinned), behind "
                f"it one between machines ({', '.join(NETWORKED)}), as in auto+nixl:HOST"
            )
        name = inside
    if name.partition(":")[0] in NETWORKED:  # an address may stand behind it
        name = name.partition(":")[0]
    if name != "auto" and name not in TRANSPORTS:
        raise TransferError(f"unknown transport {name!r}; choose from auto, {', '.join(TRANSPORTS)}")
    if name in ("p2p", "pinned") and any(device.type == "cpu" for device in devices):
        raise TransferError(
            f"transport {name!r} moves blocks between GPUs, and workers are on CPUs; choose auto or shm"
        )
    if name == "inproc":
        raise TransferError(
            "transport 'inproc' is for workers of one process, and these are processes of their own; choose auto, "
            'or set launcher="inline"'
        )


def _host_of(name: str) -> dict[str, Any]:
    host = name.partition(":")[2]
    return {"host": host} if host else {}


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
