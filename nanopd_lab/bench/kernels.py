"""Time the kernels against the memory roof, PyTorch's SDPA and, where it is installed, FlashInfer.

Method: everything that is compared runs interleaved in one process; before each timed launch the L2 cache is
filled with other, clean data; the time is between two device events around the launch, enqueued while the GPU
is still busy with that flush, so that host time doesn't show; the median of the rounds is reported. The roof
is the read bandwidth measured in the same run. Shapes: `TWELVE` (Qwen3-8B attention: 32 query heads, 8 KV
heads, head_dim 128, block size 16, bf16) and 128 ragged sequences.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nanopd_lab.attention.cuda import sdpa_causal
from nanopd_lab.kernels import gpu, ops, reference
from nanopd_lab.kernels.launches import RUNGS, AttentionShape, Launch
from nanopd_lab.kernels.reference import TOLERANCES

TWELVE = (
    (1, 512),
    (1, 2048),
    (1, 8192),
    (1, 32768),
    (8, 512),
    (8, 2048),
    (8, 8192),
    (32, 512),
    (32, 2048),
    (32, 8192),
    (128, 512),
    (128, 2048),
)
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 128, 16
MOVED_LAYERS = 36
FLUSH_BYTES = 1 << 30  # long enough that a slow host is ahead of the GPU
SCHEMA = 1


@dataclass(frozen=True)
class DecodeProblem:
    """Tensors of one decode batch over a block-major cache of one layer's worth of random blocks."""

    name: str
    query: torch.Tensor
    kv_layer: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor
    contexts: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """K and V that must be read, each once."""
        _, _, kv_heads, _, head_dim = self.kv_layer.shape
        return sum(self.contexts) * 2 * kv_heads * head_dim * self.kv_layer.element_size()


def decode_problem(
    name: str, contexts: Sequence[int], dtype: torch.dtype = torch.bfloat16, layers: int = 2, seed: int = 0
) -> DecodeProblem:
    """A batch with these context lengths; its blocks lie scattered over the pool. `layers` makes the view
    strided."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    width = -(-max(contexts) // BLOCK_SIZE)
    counts = [-(-c // BLOCK_SIZE) for c in contexts]
    total = sum(counts)
    shape = (total, layers, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    cache = torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)
    order = torch.randperm(total, generator=generator, device="cuda").int()
    tables = torch.zeros(len(contexts), width, dtype=torch.int32, device="cuda")
    first = 0
    for s, count in enumerate(counts):
        tables[s, :count] = order[first : first + count]
        first += count
    query = torch.randn(len(contexts), HEADS, HEAD_DIM, dtype=dtype, device="cuda", generator=generator)
    lens = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    return DecodeProblem(name, query, cache[:, layers - 1], tables, lens, tuple(contexts))


def ragged_contexts(count: int = 128, low: int = 64, high: int = 32768, seed: int = 0) -> tuple[int, ...]:
    """Log-normal context lengths, most of them short and a few very long, clipped to [low, high]."""
    generator = torch.Generator().manual_seed(seed)
    middle, spread = math.log(1200.0), 1.25
    drawn = (
        torch.exp(middle + spread * torch.randn(count, generator=generator)).clamp(low, high).int().tolist()
    )
    drawn[0] = high  # the range's end is always there
    return tuple(drawn)


class Timer:
    """Interleaved medians with the L2 cache flushed before every launch."""

    def __init__(self) -> None:
        self.flush_buffer = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self.checksum = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(self, buffer: torch.Tensor) -> None:
        """Read all of `buffer` once."""
        limits = gpu.limits_of(torch.cuda.current_device())
        launch = Launch("read_bandwidth.cu", "read_bandwidth", (4 * limits.multiprocessors, 1, 1), 512)
        pieces = buffer.numel() * buffer.element_size() // 16
        gpu.execute(launch, [buffer, ctypes.c_longlong(pieces), self.checksum], buffer.device)

    def flush(self) -> None:
        """Fill the L2 cache with clean lines of something else; takes the GPU some 300 µs."""
        self.read(self.flush_buffer)

    def __call__(
        self, candidates: Mapping[str, Callable[[], Any]], rounds: int = 31
    ) -> dict[str, list[float]]:
        """Microseconds of each round, by candidate."""
        for run in candidates.values():
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
        for _ in range(rounds):
            for name, run in candidates.items():
                begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self.flush()
                begun.record()
                run()
                ended.record()
                events[name].append((begun, ended))
        torch.cuda.synchronize()
        return {name: [1e3 * b.elapsed_time(e) for b, e in pairs] for name, pairs in events.items()}


def summary(times_us: Sequence[float]) -> dict[str, float]:
    """Median, and the quartiles that say how far to trust it."""
    quarters = statistics.quantiles(times_us, n=4)
    return {"median_us": statistics.median(times_us), "p25_us": quarters[0], "p75_us": quarters[2]}


def measure_ceilings(timer: Timer) -> dict[str, float]:
    """Read and copy bandwidth of large buffers, GB/s (a copy counts bytes read and written)."""
    size = 2 << 30
    source = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    times = timer(
        {"read": lambda: timer.read(source), "copy": lambda: target.copy_(source), "nothing": lambda: None},
        15,
    )
    return {
        "read_gb_s": size / statistics.median(times["read"]) / 1e3,
        "copy_gb_s": 2 * size / statistics.median(times["copy"]) / 1e3,
        "empty_event_pair_us": statistics.median(times["nothing"]),
    }


def sdpa_candidate(problem: DecodeProblem) -> Callable[[], torch.Tensor] | None:
    """PyTorch's SDPA over contiguous K and V of equal length: no paging, no raggedness; what it costs at
    best."""
    if len(set(problem.contexts)) > 1:
        return None
    count, length = len(problem.contexts), problem.contexts[0]
    k = torch.randn(count, KV_HEADS, length, HEAD_DIM, dtype=problem.query.dtype, device="cuda")
    v = torch.randn_like(k)
    q = problem.query[:, :, None]
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def flashinfer_candidates(problem: DecodeProblem) -> dict[str, Callable[[], torch.Tensor]]:
    """FlashInfer's paged decode with CUDA cores and with tensor cores, planned outside the timing; {} if not
    installed."""
    try:
        flashinfer = importlib.import_module("flashinfer")
    except ImportError:
        return {}
    pages = problem.kv_layer.transpose(
        2, 3
    ).contiguous()  # its NHD layout: [blocks, 2, block_size, kv_heads, head_dim]
    counts = [-(-c // BLOCK_SIZE) for c in problem.contexts]
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    ids = torch.cat([problem.block_tables[s, :n] for s, n in enumerate(counts)])
    last = torch.tensor(
        [(c - 1) % BLOCK_SIZE + 1 for c in problem.contexts], dtype=torch.int32, device="cuda"
    )
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, tensor_cores in (("flashinfer", False), ("flashinfer-tc", True)):
        space = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=tensor_cores)
        wrapper.plan(
            starts, ids, last, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, q_data_type=problem.query.dtype,
            kv_data_type=problem.query.dtype,
        )  # fmt: skip
        found[name] = lambda wrapper=wrapper: wrapper.run(problem.query, pages)  # type: ignore[misc]
    return found


def bench_decode(
    timer: Timer,
    problem: DecodeProblem,
    read_gb_s: float,
    rungs: Sequence[str],
    rounds: int,
    peers: bool = True,
) -> dict[str, Any]:
    """All rungs and peers on one batch; each output is first checked against float64."""
    scale = HEAD_DIM**-0.5
    shape = AttentionShape(problem.query.dtype, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    workspace = ops.make_workspace(shape, "cuda")
    starts = torch.arange(len(problem.contexts) + 1, dtype=torch.int32, device="cuda")
    args = (problem.query, problem.kv_layer, problem.block_tables, problem.context_lens)
    wanted = reference.attend(*args, starts, scale)
    candidates: dict[str, Callable[[], Any]] = {
        rung: lambda rung=rung: torch.ops.nanopd.paged_decode(*args, workspace, scale, rung)  # type: ignore[misc]
        for rung in rungs
    }
    if peers:
        candidates.update(flashinfer_candidates(problem))
    errors = {name: reference.relative_error(run(), wanted) for name, run in candidates.items()}
    for name, error in errors.items():
        if not error <= TOLERANCES[problem.query.dtype]:
            raise AssertionError(f"{name} is wrong on {problem.name}: relative error {error:.2e}")
    sdpa = sdpa_candidate(problem) if peers else None
    if sdpa is not None:
        candidates["sdpa-contiguous"] = sdpa
    floor_us = problem.kv_bytes / read_gb_s / 1e3
    results = {name: summary(times) for name, times in timer(candidates, rounds).items()}
    for name, row in results.items():
        row["fraction_of_roof"] = floor_us / row["median_us"]
        if name in errors:
            row["relative_error"] = errors[name]
    return {"name": problem.name, "kv_bytes": problem.kv_bytes, "floor_us": floor_us, "results": results}


def bench_moves(timer: Timer, copy_gb_s: float, rounds: int) -> list[dict[str, Any]]:
    """KV store of one layer and copy-on-write, gather and scatter of whole blocks, for several numbers of
    tokens."""
    rows = []
    for tokens in (512, 4096, 16384):
        blocks = tokens // BLOCK_SIZE
        order = torch.randperm(2 * blocks, device="cuda")
        times = timer(_move_candidates(tokens, order), rounds)
        for name, each in times.items():
            one_layer = name in ("kv_store", "copy_of_the_same_bytes")
            row_bytes = 2 * KV_HEADS * HEAD_DIM * 2  # K and V of a token and layer, bf16
            size = 2 * tokens * row_bytes * (1 if one_layer else MOVED_LAYERS)  # read and written
            row: dict[str, Any] = {"operation": name, "tokens": tokens, "bytes": size, **summary(each)}
            row["gb_s"] = size / row["median_us"] / 1e3
            row["fraction_of_copy"] = row["gb_s"] / copy_gb_s
            rows.append(row)
    return rows


def _move_candidates(tokens: int, order: torch.Tensor) -> dict[str, Callable[[], Any]]:
    blocks = tokens // BLOCK_SIZE
    shape = (2 * blocks + 8, MOVED_LAYERS, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    pool = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    slots = (order[:blocks, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device="cuda")).flatten()
    key = torch.randn(tokens, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    value = torch.randn_like(key)
    sources, targets = order[:blocks].contiguous(), order[blocks : 2 * blocks].contiguous()
    buffer = torch.zeros(blocks, *shape[1:], dtype=torch.bfloat16, device="cuda")
    flat = torch.randn(2 * key.numel(), dtype=torch.bfloat16, device="cuda")
    flat_to = torch.empty_like(flat)
    return {
        "kv_store": lambda: torch.ops.nanopd.kv_store(key, value, pool[:, 3], slots),
        "copy_of_the_same_bytes": lambda: flat_to.copy_(flat),
        "copy_blocks": lambda: torch.ops.nanopd.copy_blocks(pool, sources, targets),
        "gather_blocks": lambda: torch.ops.nanopd.gather_blocks(pool, sources),
        "scatter_blocks": lambda: torch.ops.nanopd.scatter_blocks(pool, targets, buffer),
    }


def bench_prefill(timer: Timer, rounds: int) -> list[dict[str, Any]]:
    """Paged prefill of one sequence against SDPA over contiguous K and V, and against gathering pages for
    SDPA."""
    rows = []
    scale = HEAD_DIM**-0.5
    shape = AttentionShape(torch.bfloat16, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    workspace = ops.make_workspace(shape, "cuda")
    for length, past in ((512, 0), (2048, 0), (8192, 0), (512, 1536), (512, 7680)):
        context = length + past
        problem = decode_problem("prefill", [context])
        query = torch.randn(length, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        args = (problem.kv_layer, problem.block_tables, problem.context_lens, starts)
        k, v = (
            x[None].contiguous()
            for x in reference.pages_of(problem.kv_layer, problem.block_tables[0], context)
        )
        folded = query.transpose(0, 1)[None]

        def paged(query: torch.Tensor = query, args: Any = args) -> torch.Tensor:
            return torch.ops.nanopd.paged_prefill(query, *args, workspace, scale)

        def sdpa(folded: torch.Tensor = folded, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
            return sdpa_causal(folded, k, v, scale)

        def gathered(
            problem: DecodeProblem = problem, context: int = context, sdpa: Any = sdpa
        ) -> torch.Tensor:
            k, v = reference.pages_of(problem.kv_layer, problem.block_tables[0], context)
            return sdpa(k=k[None], v=v[None])

        if context <= 2048:
            wanted = reference.attend(query, *args, scale)
            error = reference.relative_error(paged(), wanted)
            if not error <= TOLERANCES[torch.bfloat16]:
                raise AssertionError(f"paged prefill is wrong at {length} tokens after {past}: {error:.2e}")
        pairs = length * (length + 1) / 2 + length * past
        flops = 4 * pairs * HEADS * HEAD_DIM
        candidates: dict[str, Callable[[], Any]] = {
            "paged": paged,
            "sdpa-contiguous": sdpa,
            "gather+sdpa": gathered,
        }
        for name, each in timer(candidates, rounds).items():
            row: dict[str, Any] = {"implementation": name, "tokens": length, "past": past, **summary(each)}
            row["tflop_s"] = flops / row["median_us"] / 1e6
            rows.append(row)
    return rows


def bench(rungs: Sequence[str] = RUNGS, rounds: int = 31, peers: bool = True) -> dict[str, Any]:
    """The whole record: ceilings, the twelve shapes, the ragged batch, moves, prefill. Needs a GPU
    (ValueError)."""
    if not torch.cuda.is_available():
        raise ValueError(
            "it measures a GPU, and torch sees none here; recorded runs are in data/recorded/, and "
            "`nanopd-lab kernels check` runs every kernel in the emulator"
        )
    from nanopd_lab.bench.provenance import provenance

    timer = Timer()
    ceilings = measure_ceilings(timer)
    shapes = []
    for batch, context in TWELVE:
        problem = decode_problem(f"{batch} x {context}", [context] * batch)
        row = bench_decode(timer, problem, ceilings["read_gb_s"], rungs, rounds, peers)
        shapes.append({**row, "batch": batch, "context": context})
        del problem
    contexts = ragged_contexts()
    ragged = bench_decode(
        timer, decode_problem("128 ragged", contexts), ceilings["read_gb_s"], rungs, rounds, peers
    )
    return {
        "kind": "kernels",
        "schema": SCHEMA,
        "provenance": provenance(),
        "device": {
            "name": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver": _driver_version(),
            **asdict(gpu.limits_of(torch.cuda.current_device())),
        },
        "peers": _peer_versions() if peers else {},
        "method": {
            "rounds": rounds,
            "flush_bytes": FLUSH_BYTES,
            "statistic": "median, interleaved, L2 flushed by reading",
        },
        "attention": {
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "block_size": BLOCK_SIZE,
            "dtype": "bfloat16",
        },
        "ceilings": ceilings,
        "shapes": shapes,
        "ragged": {**ragged, "contexts": list(contexts)},
        "moves": bench_moves(timer, ceilings["copy_gb_s"], rounds),
        "prefill": bench_prefill(timer, rounds),
    }


def _driver_version() -> str:
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _peer_versions() -> dict[str, str]:
    from importlib import metadata

    versions = {"torch": str(torch.__version__)}
    try:
        versions["flashinfer"] = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        versions["flashinfer"] = "not installed"
    return versions


def geometric_mean(record: Mapping[str, Any], name: str) -> float | None:
    """Geometric mean of the medians over the twelve shapes, µs; None where a shape lacks `name`."""
    rows = [shape["results"].get(name) for shape in record["shapes"]]
    if any(row is None for row in rows):
        return None
    return math.exp(sum(math.log(row["median_us"]) for row in rows) / len(rows))


def table(record: Mapping[str, Any]) -> str:
    """The record as text: one row a shape, one column an implementation, in µs, and the best rung's fraction
    of the roof."""
    columns = list(dict.fromkeys(name for shape in record["shapes"] for name in shape["results"]))
    lines = [
        f"{'shape':<12}{'roof':>8}" + "".join(f"{name[:14]:>15}" for name in columns) + f"{'of roof':>9}"
    ]
    for shape in [*record["shapes"], record["ragged"]]:
        cells = "".join(
            f"{shape['results'][name]['median_us']:>15.1f}" if name in shape["results"] else f"{'–':>15}"
            for name in columns
        )
        ours = max(shape["results"][r]["fraction_of_roof"] for r in RUNGS if r in shape["results"])
        lines.append(f"{shape['name']:<12}{shape['floor_us']:>8.1f}{cells}{ours:>9.1%}")
    means = ((name, geometric_mean(record, name)) for name in columns)
    lines.append("geometric means: " + ", ".join(f"{name} {mean:.1f} µs" for name, mean in means if mean))
    for row in record["moves"]:
        lines.append(
            f"{row['operation']:<24}{row['tokens']:>6} tokens {row['median_us']:>9.1f} µs "
            f"{row['gb_s']:>7.0f} GB/s {row['fraction_of_copy']:>6.1%} of copy"
        )
    for row in record["prefill"]:
        lines.append(
            f"prefill {row['implementation']:<17}{row['tokens']:>6} after {row['past']:<6} "
            f"{row['median_us']:>9.1f} µs {row['tflop_s']:>6.0f} TFLOP/s"
        )
    return "\n".join(lines)
