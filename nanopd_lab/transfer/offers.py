"""What each worker offers, when they are on several machines, and the transport that follows from it.

offers = [own_offer(name, device), …]      made where each worker is, sent to whoever starts them
choice = choose_between(offers)            a transport by name, and why
create_transport(listen_on(choice.name, address), devices)    there again; devices of the workers on its machine
"""

from __future__ import annotations

import platform
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from nanopd_lab.transfer.base import TransferError
from nanopd_lab.transfer.nixl_agent import INSTALL, is_installed, why_not
from nanopd_lab.transfer.registry import NETWORKED, Choice, choose_transport


class Offer(NamedTuple):
    """A worker as others need to know it.

    host: equal for those who can share memory, see `host_identity`
    device: "cpu", "cuda:0", …
    transports: those between machines that can be loaded there
    without_nixl: why it isn't among them
    """

    worker: str
    host: str
    device: str
    transports: tuple[str, ...]
    without_nixl: str = f"to have it there: {INSTALL}"


def host_identity() -> str:
    """Of this machine since its start; containers that do not see each other's processes are machines of their own.

    Readable first, for messages: the machine's name.
    """
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    try:
        mark = f"{boot.read_text().strip()}:{processes.readlink()}"
    except OSError:  # not Linux
        mark = f"{uuid.getnode():x}"
    return f"{platform.node()}/{uuid.uuid5(uuid.NAMESPACE_OID, mark).hex[:12]}"


def own_offer(worker: str, device: torch.device | str, address: str | None = None) -> Offer:
    """What a worker in this process, on this device, can offer.

    Args:
        address: of this machine that others reach it at; nixl is then offered only if it starts there, which is tried
    """
    offer = Offer(worker, host_identity(), str(device), tuple(NETWORKED))
    trouble = why_not(address) if address and is_installed() else ""
    if is_installed() and not trouble:
        return offer
    others = tuple(name for name in NETWORKED if name != "nixl")
    return offer._replace(transports=others, **({"without_nixl": trouble} if trouble else {}))


def choose_between(offers: Sequence[Offer], one_process: bool = False) -> Choice:
    """The fastest transport that all of them have; on several machines one inside each and one between them.

    Where a machine has several workers the name is "auto+nixl" or "auto+torchdist": its own workers choose among
    themselves, by `choose_transport`.

    Raises:
        TransferError: CPU and GPU workers in different processes, or nothing that all have.
    """
    hosts: dict[str, list[Offer]] = {}
    for offer in offers:
        hosts.setdefault(offer.host, []).append(offer)
    if len(hosts) == 1:
        return choose_transport([offer.device for offer in offers], one_process)
    kinds = {torch.device(offer.device).type for offer in offers}
    if len(kinds) > 1:
        raise TransferError(
            f"no transport joins workers on {' and '.join(sorted(kinds))} of different machines; put all of them on "
            "GPUs or all on CPUs"
        )
    lacking = [offer for offer in offers if "nixl" not in offer.transports]
    name = "torchdist" if lacking else "nixl"
    for offer in offers:
        if name not in offer.transports:
            raise TransferError(
                f"{offer.worker} on {_short(offer.host)} offers {', '.join(offer.transports) or 'nothing'} between "
                f"machines, others {', '.join(NETWORKED)}; install the same everywhere: {INSTALL}"
            )
    reason = f"workers on {len(hosts)} machines, "
    if lacking:
        first, more = lacking[0], len(lacking) - 1
        others = f" and {more} other{'s' * (more > 1)}" if more else ""
        reason += (
            f"and {first.worker} on {_short(first.host)}{others} lack{'s' * (not more)} nixl ("
            f"{first.without_nixl}): torch.distributed, by {'NCCL' if kinds == {'cuda'} else 'gloo'}"
        )
    else:
        reason += "and nixl on each: RDMA where both ends have it, else TCP"
    crowded = [host for host, here in hosts.items() if len(here) > 1]
    if not crowded:
        return Choice(name, reason)
    inside = "in shared memory" if kinds == {"cpu"} else "as its GPUs can reach each other"
    return Choice(
        f"auto+{name}",
        f"{reason}; workers of one machine ({', '.join(_short(host) for host in crowded)}) exchange blocks {inside}",
    )


def listen_on(name: str, address: str) -> str:
    """The same transport, listening at this address of the machine if it is one between machines."""
    return f"{name}:{address}" if name.rpartition("+")[2] in NETWORKED else name


def _short(host: str) -> str:
    return host.partition("/")[0] or host
