"""`nanopd-lab serve`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nanopd_lab.bench import serving_cli

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

LOOPBACK = "127.0.0.1"


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser("serve", help="a server for OpenAI's clients, in front of a cluster")
    serving_cli.add_engine_options(parser)
    parser.add_argument(
        "--policy",
        default="least-loaded",
        help="collocated, 1p2d (any xPyD), adaptive, ... (default least-loaded)",
    )
    parser.add_argument(
        "--cost-model", help="for policies that estimate: a name in data/hardware, or a file of `fit`"
    )
    parser.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="what `adaptive` works for: ttft:500 tpot:100",
    )
    parser.add_argument(
        "--host", default=LOOPBACK, help=f"address to listen on (default {LOOPBACK}: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    parser.add_argument("--served-model-name", help="that clients ask for; default: --model")
    parser.add_argument("--api-key", help="that clients must send; default: anybody may ask")
    parser.add_argument("--max-queue", type=int, default=1000, help="requests without a worker; then 503")
    parser.add_argument("--request-timeout-sec", type=float, default=600.0, help="then a request fails")
    parser.add_argument(
        "--enable-per-request-metrics",
        action="store_true",
        help="answers say how long things took, as vLLM's do with this flag",
    )
    parser.add_argument(
        "--log-level", default="warning", help="uvicorn's: critical to trace (default warning)"
    )
    parser.set_defaults(run=run, launcher="process")


def run(args: argparse.Namespace) -> int:
    """Start the cluster, listen until interrupted, stop it.

    Raises:
        ValueError: the extra is missing, or a setting is wrong.
    """
    if missing := [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]:
        raise ValueError(f"serving needs {missing[0]}: pip install 'nanopd-lab[serve]'")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"port is {args.port}; it must lie between 0 and 65535")
    if args.max_queue < 1:
        raise ValueError(f"max_queue is {args.max_queue}; it must be at least 1")
    import socket
    from dataclasses import replace

    import uvicorn

    from nanopd_lab.cluster.actions import Limits
    from nanopd_lab.cluster.cluster import Cluster
    from nanopd_lab.serve.app import create_app
    from nanopd_lab.serve.server import Server

    config = replace(
        serving_cli.cluster_config(args, args.policy),
        limits=Limits(max_queue=args.max_queue),
        request_timeout_s=args.request_timeout_sec,
    )
    try:  # before anything is loaded
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listening = socket.create_server((args.host, args.port), family=family)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {args.host}, port {args.port}: {error.strerror}; choose another --host or --port "
            "(0: any that is free)"
        ) from None
    with listening, serving_cli.terminable(), Cluster(config) as cluster:
        app = create_app(cluster, args.served_model_name, args.api_key, args.enable_per_request_metrics)
        server = Server(uvicorn.Config(app, log_level=args.log_level))
        host, port = listening.getsockname()[:2]
        print(f"{args.served_model_name or args.model} at http://{host}:{port}/v1", flush=True)
        server.run(sockets=[listening])
    return 0
