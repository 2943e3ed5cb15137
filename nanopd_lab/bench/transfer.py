"""Each transport against the link under it, measured in the same run and taking turns with it.

    nanopd-lab transfer bench --tokens 256 2048 8192 --processes 1 2

A pull is timed on the host, from `start` to the `poll` that reports it, with scattered blocks, once alone and once with
several under way (as when a prompt's chunks follow each other); its bytes are checked first. The yardsticks:

    inproc, shm   one large copy by one thread (memmove) between the same two pools
    p2p           one large copy between the same two GPUs (or inside the one they share)
    pinned        large pinned copies, source GPU to host and host to target GPU, both at once; each alone is given too
    torchdist,    one TCP connection over loopback between two processes, with nothing but the kernel's copies; on GPUs
    nixl          as p2p

On GPUs nanoPD's way is timed beside them: layer-major pools, one copy a block and layer, first all out, then all in.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from nanopd_lab.bench.provenance import provenance
from nanopd_lab.cluster.starting import process_context
from nanopd_lab.kv.cache import KVShape
from nanopd_lab.transfer.base import Pool, PoolAddress, Pull, PullStatus, Transport
from nanopd_lab.transfer.device_memory import can_reach, copy_async, enable_peer_access, open_memory
from nanopd_lab.transfer.pull_service import LOOPBACK
from nanopd_lab.transfer.registry import create_transport
from nanopd_lab.transfer.segments import map_tensor

SCHEMA = "nanopd-lab/transfer/1"
LINK_BYTES = 300_000_000  # of a yardstick's copy: far more than any cache, and about 2,048 tokens of Qwen3-8B
IN_FLIGHT = (1, 4)
LINKS = {
    "inproc": "large copy",
    "shm": "large copy",
    "p2p": "large copy",
    "pinned": "both ways at once",
    "torchdist": "large copy",
    "nixl": "large copy",
}
BETWEEN = ("torchdist", "nixl")
SOCKET = "loopback socket"


def link_name(transport: str, target: torch.device) -> str:
    """Which yardstick."""
    return SOCKET if transport in BETWEEN and target.type == "cpu" else LINKS[transport]


def kv_shape(name: str, block_size: int = 16) -> KVShape:
    """KV of a named model in bf16.

    Raises:
        ValueError: unknown name.
    """
    from nanopd_lab.model.shapes import SHAPES

    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; choose from {', '.join(SHAPES)}")
    config = SHAPES[name]
    return KVShape(
        config["num_hidden_layers"],
        config["num_key_value_heads"],
        config["head_dim"],
        block_size,
        torch.bfloat16,
    )


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    shape: KVShape
    tokens: tuple[int, ...]
    source: torch.device
    target: torch.device
    rounds: int

    @property
    def num_blocks(self) -> int:
        """Of a pool: the longest pull, and enough for the yardsticks."""
        return max(-(-max(self.tokens) // self.shape.block_size), -(-LINK_BYTES // self.shape.block_bytes))

    def pool(self, transport: Transport, device: torch.device, seed: int) -> Pool:
        """Block b of the source's holds b everywhere, so that what arrives can be checked."""
        s = self.shape
        size = (self.num_blocks, s.num_layers, 2, s.num_kv_heads, s.block_size, s.head_dim)
        memory = transport.allocate(size, s.dtype, device)
        numbers = (seed + torch.arange(self.num_blocks)).to(torch.int16).to(device)
        halves = memory.view(self.num_blocks, -1).view(torch.int16)
        halves.copy_(numbers[:, None].expand_as(halves))
        if memory.is_cuda:
            torch.cuda.synchronize(device)
        return Pool(memory, transport.generations(self.num_blocks))


# ---- a pair of workers -------------------------------------------------------------------------------------


class Pair:
    """A connected reader, and the source's memory as the reader's process sees it."""

    def __init__(self, name: str, plan: Plan, address: PoolAddress, pools: dict[str, Pool]) -> None:
        self.name, self.plan = name, plan
        self.reader = create_transport(name, pools=pools)
        self.own = plan.pool(self.reader, plan.target, 0)
        self.reader.register("reader", self.own)
        self.reader.connect(address)
        self._pull_ids = iter(range(1 << 40))
        self._random = random.Random(0)
        self.release: Callable[[], None] | None = None
        self.stack = ExitStack()  # of what the yardstick needs
        self.source = (
            self.own.memory
        )  # of those between machines nothing is here, and no yardstick asks for it
        if name == "inproc":
            self.source = pools[address.worker].memory
        elif name == "shm":
            self.source = map_tensor(address.details["memory"])
        elif name not in BETWEEN:
            through = plan.target if can_reach(plan.target, plan.source) else plan.source
            shape = (address.num_blocks, address.block_bytes)
            self.source, self.release = open_memory(address.details["memory"], shape, through)

    def pull(self, tokens: int, in_flight: int, check: bool = False) -> float:
        """Seconds for each of so many pulls."""
        blocks, count = range(self.plan.num_blocks), -(-tokens // self.plan.shape.block_size)
        pulls = [
            Pull(
                next(self._pull_ids), "source", self._random.sample(blocks, count), [0] * count,
                self._random.sample(blocks, count),
            )
            for _ in range(in_flight)
        ]  # fmt: skip
        by_threads = self.plan.target.type == "cpu" or self.name in BETWEEN
        ended = 0
        begun = time.perf_counter()
        for pull in pulls:
            self.reader.start(pull, time.monotonic() + 60)
        while ended < in_flight:
            for result in self.reader.poll():
                if result.status is not PullStatus.DONE:
                    raise RuntimeError(f"{self.name}: {result}")
                ended += 1
            if by_threads:
                time.sleep(2e-5)  # what copies needs Python's lock between its pieces
        if self.name == "inproc" and self.plan.target.type != "cpu":  # its copies are ordered on the stream
            torch.cuda.synchronize(self.plan.target)
        seconds = time.perf_counter() - begun
        if check:
            arrived = self.own.memory[list(pulls[-1].target_blocks)].view(torch.int16).view(count, -1)
            wanted = torch.tensor(pulls[-1].source_blocks, dtype=torch.int16, device=arrived.device)
            if not bool((arrived == wanted[:, None]).all()):
                raise RuntimeError(f"{self.name}: the wrong bytes arrived")
        return seconds / in_flight

    def close(self) -> None:
        """Both ends."""
        if self.release is not None:
            self.release()
        self.reader.close()
        self.stack.close()


def _source_process(names: Sequence[str], plan: Plan, pipe: Connection) -> None:
    transports = [create_transport(name) for name in names]
    pools = [plan.pool(transport, plan.source, 0) for transport in transports]
    pipe.send([t.register("source", pool) for t, pool in zip(transports, pools, strict=True)])
    pipe.recv()
    for transport in transports:
        transport.close()


@contextmanager
def sources(
    names: Sequence[str], plan: Plan, processes: int
) -> Iterator[list[tuple[PoolAddress, dict[str, Pool]]]]:
    """A source for each transport, in this process or in one spawned for all: its address, and the pools that readers
    in its own process share with it."""
    with ExitStack() as stack:
        shared: list[dict[str, Pool]] = [{} for _ in names]
        if processes == 1:
            transports = [
                create_transport(name, pools=pools) for name, pools in zip(names, shared, strict=True)
            ]
            addresses = [t.register("source", plan.pool(t, plan.source, 0)) for t in transports]
            for transport in transports:
                stack.callback(transport.close)
        else:
            context = process_context([str(plan.source), str(plan.target)])
            ours, theirs = context.Pipe()
            process = context.Process(target=_source_process, args=(names, plan, theirs), daemon=True)
            process.start()
            stack.callback(process.join)
            theirs.close()
            addresses = ours.recv()
            stack.callback(ours.send, "close")
        yield list(zip(addresses, shared, strict=True))


@contextmanager
def connected(names: Sequence[str], plan: Plan, processes: int) -> Iterator[list[Pair]]:
    """A reader in this process for each source."""
    with sources(names, plan, processes) as found, ExitStack() as stack:
        pairs = []
        for name, (address, pools) in zip(names, found, strict=True):
            pairs.append(Pair(name, plan, address, pools))
            stack.callback(pairs[-1].close)
        yield pairs


# ---- yardsticks --------------------------------------------------------------------------------------------


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
        "both ways at once": lambda: _seconds(both, devices),
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


# ---- the measurement ---------------------------------------------------------------------------------------


def default_transports(source: torch.device, target: torch.device) -> tuple[str, ...]:
    """Those that work between these devices."""
    if target.type == "cpu":
        return ("inproc", "shm")
    return ("p2p", "pinned") if can_reach(target, source) else ("pinned",)


def bench(
    transports: Sequence[str] | None = None,
    tokens: Sequence[int] = (256, 2048, 8192),
    shape: str = "qwen3-8b",
    processes: Sequence[int] = (1, 2),
    rounds: int = 9,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The whole record. On GPUs if torch sees any: source and target on two if there are two, else both on one.

    Raises:
        ValueError: unknown shape or transport, or counts below 1.
    """
    if min((*tokens, rounds), default=0) < 1 or not processes or not set(processes) <= {1, 2}:
        raise ValueError(
            f"tokens {tokens} and rounds {rounds} must be at least 1, processes {processes} 1 or 2"
        )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    target = torch.device("cuda", 0) if gpus else torch.device("cpu")
    source = torch.device("cuda", gpus - 1 if gpus <= 2 else 1) if gpus else target
    names = tuple(transports) if transports else default_transports(source, target)
    if wrong := set(names) - set(LINKS):
        raise ValueError(f"unknown transports {sorted(wrong)}; choose from {', '.join(LINKS)}")
    plan = Plan(kv_shape(shape), tuple(tokens), source, target, rounds)
    links, rows = {}, []
    for count in processes:
        there = [name for name in names if count == 1 or name != "inproc"]
        if there:
            report(f"{' and '.join(there)}, {count} process{'es' * (count > 1)}")
            with connected(there, plan, count) as pairs:
                links[str(count)], found = measure(plan, pairs, count)
            rows += found
    nanopd = {}
    if gpus:
        report("nanoPD's way: layer-major, one copy a block and layer")
        for each in (n for n in tokens if n <= 2048):
            run = nanopd_way(plan, each)
            run()
            seconds = statistics.median(run() for _ in range(3))
            nanopd[str(each)] = {
                "median_ms": 1e3 * seconds,
                "gb_s": each * plan.shape.token_bytes / seconds / 1e9,
            }
    return {
        "schema": SCHEMA,
        "provenance": provenance(),
        "shape": {"name": shape, **asdict(plan.shape), "dtype": "bfloat16", "block_bytes": plan.shape.block_bytes},
        "devices": {"source": describe(source), "target": describe(target), "shared": source == target},
        "method": {
            "rounds": rounds, "link_bytes": LINK_BYTES,
            "statistic": "median of host times, start to poll, taking turns; scattered blocks",
        },
        "links_gb_s": links,
        "rows": rows,
        "nanopd_layer_major": nanopd,
    }  # fmt: skip


def measure(
    plan: Plan, pairs: Sequence[Pair], processes: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    candidates: dict[tuple[Any, ...], Callable[[], float]] = {}
    for pair in pairs:
        if pair.name == "pinned":
            candidates |= {("link", "pinned", name): run for name, run in pinned_links(plan).items()}
        else:
            name = link_name(pair.name, plan.target)
            on_cpu = socket_link if name == SOCKET else memmove_link
            candidates["link", pair.name, name] = (on_cpu if plan.target.type == "cpu" else copy_link)(pair)
        for tokens in plan.tokens:
            pair.pull(tokens, 1, check=True)
            for count in IN_FLIGHT:
                candidates["pull", pair.name, tokens, count] = lambda p=pair, t=tokens, c=count: p.pull(t, c)  # type: ignore[misc]
    for run in candidates.values():
        run()
    times: dict[tuple[Any, ...], list[float]] = {key: [] for key in candidates}
    for _ in range(plan.rounds):
        for key, run in candidates.items():
            times[key].append(run())
    medians = {key: statistics.median(each) for key, each in times.items()}
    links = {f"{key[1]}: {key[2]}": LINK_BYTES / medians[key] / 1e9 for key in medians if key[0] == "link"}
    rows = []
    for key, seconds in medians.items():
        if key[0] == "pull":
            _, name, tokens, count = key
            blocks = -(-tokens // plan.shape.block_size)
            speed = blocks * plan.shape.block_bytes / seconds / 1e9
            rows.append({
                "transport": name, "processes": processes, "tokens": tokens, "blocks": blocks, "in_flight": count,
                "median_ms": 1e3 * seconds, "min_ms": 1e3 * min(times[key]), "max_ms": 1e3 * max(times[key]),
                "gb_s": speed, "link": link_name(name, plan.target),
                "fraction_of_link": speed / links[f"{name}: {link_name(name, plan.target)}"],
            })  # fmt: skip
    return links, rows


def describe(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def table(record: Mapping[str, Any]) -> str:
    """The record for people."""
    devices = record["devices"]
    lines = [
        f"{record['shape']['name']}: blocks of {record['shape']['block_bytes'] / 1e6:.2f} MB; "
        + (f"source and target share {devices['source']}" if devices["shared"] else
           f"from {devices['source']} to {devices['target']}")
    ]  # fmt: skip
    for processes, links in record["links_gb_s"].items():
        lines += [
            f"link, {processes} process(es)  {name:<28}{speed:>8.1f} GB/s" for name, speed in links.items()
        ]
    lines.append(
        f"{'transport':<10}{'processes':>10}{'tokens':>8}{'in flight':>10}{'ms a pull':>11}{'GB/s':>8}  of link"
    )
    for row in record["rows"]:
        lines.append(
            f"{row['transport']:<10}{row['processes']:>10}{row['tokens']:>8}{row['in_flight']:>10}"
            f"{row['median_ms']:>11.3f}{row['gb_s']:>8.1f}{row['fraction_of_link']:>9.1%}"
        )
    for tokens, row in record["nanopd_layer_major"].items():
        lines.append(
            f"nanoPD's layout and loop, {tokens} tokens: {row['median_ms']:.1f} ms, {row['gb_s']:.2f} GB/s"
        )
    return "\n".join(lines)
