"""Flags of launcher "ray", for every command that starts a cluster."""

from __future__ import annotations

import argparse

from nanopd_lab.cluster.ray_options import PLACEMENTS, RayOptions

_FLAG = "--ray-"
LAUNCHER_HELP = "process: one process a worker, on this machine; ray: an actor each, on one machine or many"


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    """Add them, in a group of their own."""
    group = parser.add_argument_group("with --launcher ray")
    group.add_argument(
        _FLAG + "address",
        metavar="HOST:PORT",
        help="of a running Ray's head, or `auto` for the one that this machine belongs to; default: start one of our "
        "own, for this machine only, and stop it again",
    )
    group.add_argument(
        _FLAG + "placement",
        choices=PLACEMENTS,
        default="pack",
        help="on few nodes (default), on many, all on one, or prefill workers on one and decode workers on another",
    )
    group.add_argument(
        _FLAG + "nodes",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="of each worker, instead of a placement",
    )
    group.add_argument(
        _FLAG + "num-cpus", type=float, help="that each worker takes; default: its --threads, or 1"
    )
    group.add_argument(
        _FLAG + "num-gpus", type=float, help="that each worker takes, 0 to 1; default: 1 if Ray has any"
    )
    group.add_argument(
        _FLAG + "resources", nargs="+", default=[], metavar="NAME=AMOUNT", help="further ones that each worker takes"
    )  # fmt: skip
    group.add_argument(
        _FLAG + "host", help="address of this machine that workers call; default: as Ray knows it"
    )
    group.add_argument(
        _FLAG + "port", type=int, default=0, help="that they call; default 0: any that is free"
    )
    group.add_argument(_FLAG + "namespace", help="Ray's, of what is started there")
    group.add_argument(
        _FLAG + "temp-dir", help="folder for the sockets and logs of our own Ray; removed with it"
    )
    group.add_argument(
        _FLAG + "timeout-sec", type=float, default=60.0, help="for Ray to find room for the workers (default 60)"
    )  # fmt: skip


def ray_options(args: argparse.Namespace) -> RayOptions:
    """What the flags say.

    Raises:
        ValueError: one is out of range.
    """
    resources: dict[str, float] = {}
    for word in args.ray_resources:
        name, _, amount = word.partition("=")
        try:
            resources[name] = float(amount)
        except ValueError:
            raise ValueError(
                f"--ray-resources {word!r}: give NAME=AMOUNT, as in accelerator_type:H100=1"
            ) from None
    return RayOptions(
        address=args.ray_address,
        namespace=args.ray_namespace,
        placement=args.ray_placement,
        nodes=tuple(args.ray_nodes),
        num_cpus=args.ray_num_cpus,
        num_gpus=args.ray_num_gpus,
        resources=resources,
        host=args.ray_host,
        port=args.ray_port,
        temp_dir=args.ray_temp_dir,
        place_timeout_s=args.ray_timeout_sec,
    )
