"""The link under each transport, as a yardstick that takes turns with it:

    inproc, shm   one large copy by one thread (memmove) between the same two pools
    p2p           one large copy between the same two GPUs (or inside the one they share)
    pinned        large pinned copies, source GPU to host and host to target GPU, both at once; each alone is given too
    torchdist,    one TCP connection over loopback between two processes, with nothing but the kernel's copies; on GPUs
    nixl          as p2p

On GPUs nanoPD's way beside them: layer-major pools, one copy a block and layer, first all out, then all in.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from nanopd_lab.starting import process_context
from nanopd_lab.transfer.device_memory import copy_async, enable_peer_access
from nanopd_lab.transfer.pull_service import LOOPBACK
from nanopd_lab.transfer.registry import NETWORKED
from nanopd_lab.transfer.timed_pair import Pair
from nanopd_lab.transfer.timed_plan import LINK_BYTES, Plan

LARGE, SOCKET, BOTH_WAYS = "large copy", "loopback socket", "both ways at once"


def link_name(transport: str, target: torch.device) -> str:
    """Which yardstick."""
    if transport == "pinned":
        return BOTH_WAYS
    return SOCKET if transport in NETWORKED and target.type == "cpu" else LARGE


def links_under(pair: Pair) -> dict[str, Callable[[], float]]:
    """Yardsticks by name; each gives the seconds of a copy of `LINK_BYTES`."""
    if pair.name == "pinned":
        return pinned_links(pair.plan)
    name = link_name(pair.name, pair.plan.target)
    if name == SOCKET:
        return {name: socket_link(pair)}
    return {name: (memmove_link if pair.plan.target.type == "cpu" else copy_link)(pair)}


def _seconds(run: Callable[[], Any], devices: Sequence[torch.device]) -> float:
    begun = time.perf_counter()
    run()
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def memmove_link(pair: Pair) -> Callable[[], float]:
    """One large copy on the CPU by one thread, between the pools themselves; each time another part of them, as pages
    are not all equally fast (on a virtual machine by as much as a third)."""
    target, source = pair.own.memory.data_ptr(), pair.source.data_ptr()
    size = pair.own.memory.numel() * pair.own.memory.itemsize
    places = itertools.cycle(range(0, size - LINK_BYTES + 1, LINK_BYTES))

    def run() -> None:
        place = next(places)
        ctypes.memmove(target + place, source + place, LINK_BYTES)

    return lambda: _seconds(run, [])


def socket_link(pair: Pair) -> Callable[[], float]:
    """A TCP connection over loopback from another process: what Python's `sendall` and `recv_into` make of it."""
    context = process_context(["cpu"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_send_over_loopback, args=(theirs, LINK_BYTES), daemon=True)
    process.start()
    theirs.close()
    connection = socket.create_connection((LOOPBACK, ours.recv()))
    data = memoryview(bytearray(LINK_BYTES))

    def close() -> None:
        ours.send(False)
        connection.close()
        process.join()

    pair.stack.callback(close)

    def run() -> None:
        ours.send(True)
        received = 0
        while received < LINK_BYTES:
            received += connection.recv_into(data[received:])

    return lambda: _seconds(run, [])


def _send_over_loopback(pipe: Connection, num_bytes: int) -> None:
    data = bytes(num_bytes)
    with socket.create_server((LOOPBACK, 0)) as listening:
        pipe.send(listening.getsockname()[1])
        connection, _ = listening.accept()
    with connection:
        while pipe.recv():
            connection.sendall(data)


def copy_link(pair: Pair) -> Callable[[], float]:
    """One large copy between two buffers of a process, by the source's copy engine, right behind another one.

    That is the fastest there is: 394 GB/s between two H100s, 389 by the target's. The first after other work takes a
    quarter longer, and a pool that was opened through another GPU's context is copied at 265–290.
    """
    into, out_of = pair.plan.target, pair.plan.source
    target = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=into)
    source = torch.zeros(LINK_BYTES, dtype=torch.uint8, device=out_of)
    if into != out_of:
        enable_peer_access(out_of, into)
    stream = torch.cuda.Stream(out_of)

    def run() -> float:
        for device in (into, out_of):
            torch.cuda.synchronize(device)
        with torch.cuda.device(out_of):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
            for event in events:
                event.record(stream)
                if event is not events[-1]:
                    copy_async(target.data_ptr(), source.data_ptr(), LINK_BYTES, stream)
            events[-1].synchronize()
        return events[1].elapsed_time(events[2]) / 1e3

    return run


def pinned_links(plan: Plan) -> dict[str, Callable[[], float]]:
    """Large pinned copies: source GPU to host, host to target GPU, and both at once."""
    out_of, into = (torch.zeros(LINK_BYTES, dtype=torch.uint8, device=d) for d in (plan.source, plan.target))
    host_in, host_out = (torch.zeros(LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    outward, inward = torch.cuda.Stream(plan.source), torch.cuda.Stream(plan.target)

    def d2h() -> None:
        with torch.cuda.stream(outward):
            host_in.copy_(out_of, non_blocking=True)

    def h2d() -> None:
        with torch.cuda.stream(inward):
            into.copy_(host_out, non_blocking=True)

    def both() -> None:
        d2h()
        h2d()

    devices = [plan.source, plan.target]
    return {
        "source GPU to host": lambda: _seconds(d2h, devices),
        "host to target GPU": lambda: _seconds(h2d, devices),
        BOTH_WAYS: lambda: _seconds(both, devices),
    }


def nanopd_way(plan: Plan, tokens: int) -> Callable[[], float]:
    """Layer-major pools; every block of every layer copied by itself to pinned memory, then from there."""
    s, count = plan.shape, -(-tokens // plan.shape.block_size)
    inner = (2, s.num_kv_heads, s.block_size, s.head_dim)
    source, target = (
        torch.zeros(s.num_layers, plan.num_blocks, *inner, dtype=s.dtype, device=d)
        for d in (plan.source, plan.target)
    )
    host = torch.zeros(s.num_layers, count, *inner, dtype=s.dtype, pin_memory=True)
    blocks = random.Random(0).sample(range(plan.num_blocks), count)

    def run() -> None:
        for layer in range(s.num_layers):
            for i, block in enumerate(blocks):
                host[layer, i].copy_(source[layer, block], non_blocking=True)
        torch.cuda.synchronize(plan.source)
        for layer in range(s.num_layers):
            for i, block in enumerate(blocks):
                target[layer, block].copy_(host[layer, i], non_blocking=True)

    return lambda: _seconds(run, [plan.target])
