"""`nanopd-lab kernels check`: does every kernel compile everywhere and compute what it should, here and
now?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from nanopd_lab.kernels import emulated, gpu, ops, reference
from nanopd_lab.kernels.decode_launches import RUNGS, decode_launch
from nanopd_lab.kernels.errors import CompilerMissingError
from nanopd_lab.kernels.launches import (
    BLOCK_SIZES,
    ELEMENTS,
    HEAD_DIMS,
    AttentionShape,
    DeviceLimits,
    Launch,
    move_launch,
    store_launch,
    top_p_launch,
)
from nanopd_lab.kernels.prefill_launches import prefill_launch
from nanopd_lab.kernels.problems import Problem, make_problem
from nanopd_lab.kernels.product_launches import (
    CLUSTERS,
    ROWS_TUNINGS,
    SOME_COLUMNS,
    few_rows_launch,
    some_rows_launch,
    some_rows_tuning,
)

EMULATED = (
    (torch.bfloat16, 128, 16, 4, 2, (1, 70, 0, 33, 150)),
    (torch.float16, 64, 8, 3, 3, (129, 5, 8)),
    (torch.float32, 64, 16, 3, 3, (50, 3, 16, 100)),
    (torch.float16, 256, 32, 8, 1, (40, 17)),
)
ON_GPU = (
    (torch.bfloat16, 128, 16, 4, 8, (1, 700, 0, 33, 4000, 20000)),
    (torch.float16, 64, 8, 3, 3, (129, 5, 3000)),
    (torch.float32, 64, 16, 3, 3, (50, 3, 2000)),
    (torch.float16, 256, 32, 8, 2, (40, 17, 999)),
)


GROUPS = {64: 3, 128: 4, 256: 3}  # query heads for a KV head, by head_dim: 4 fill their lanes, 3 don't


@dataclass(frozen=True)
class Line:
    """One thing checked. `ok` is None where it could not be checked, and `detail` says why."""

    what: str
    ok: bool | None
    detail: str


def all_launches(full: bool = False) -> Iterator[tuple[str, Launch]]:
    """Every kernel in every type and head_dim, each with one group and one block size; `full` takes all of them."""
    for dtype in ELEMENTS:
        for head_dim in HEAD_DIMS:
            for block_size in BLOCK_SIZES if full else (16,):
                for group in range(1, 9) if full else (GROUPS[head_dim],):
                    shape = AttentionShape(dtype, 2 * group, 2, head_dim, block_size)
                    name = f"{ELEMENTS[dtype]} head_dim {head_dim} block {block_size} group {group}"
                    for rung in RUNGS:
                        if not (rung == "mma" and dtype == torch.float32):
                            yield f"{rung} {name}", decode_launch(rung, shape, 64, 1024)
                    if dtype != torch.float32:
                        yield f"prefill {name}", prefill_launch(shape)
                    yield f"kv_store {name}", store_launch(shape, 16)
    for dtype in (torch.bfloat16, torch.float16):
        for rows in ROWS_TUNINGS:
            yield f"few_rows {ELEMENTS[dtype]} {rows}", few_rows_launch(dtype, rows, 64, 64)
        for rows in SOME_COLUMNS:
            for cluster in CLUSTERS:
                tuning = replace(some_rows_tuning(64, DeviceLimits()), cluster=cluster)
                launch = some_rows_launch(dtype, rows, 64, 128, tuning=tuning)
                yield f"some_rows {ELEMENTS[dtype]} {rows} cluster {cluster}", launch
    yield "top_p", top_p_launch(4)
    yield "move_blocks", move_launch(4, 65536)
    yield "read_bandwidth", Launch("read_bandwidth.cu", "read_bandwidth", (1, 1, 1), 512)


def check_compiles(full: bool = False) -> Iterator[Line]:
    """Every kernel for every architecture, with NVRTC; no GPU needed."""
    for architecture in gpu.ARCHITECTURES:
        begun = time.perf_counter()
        clusters = architecture != "sm_80"
        launches = [
            launch for _, launch in all_launches(full) if clusters or launch.defines.get("CLUSTER", 1) == 1
        ]

        def build(launch: Launch, architecture: str = architecture) -> bytes:
            return gpu.compile_cubin(launch.source, architecture, launch.defines, launch.file)

        try:
            build(launches[0])  # finds out alone whether there is a compiler
            with ThreadPoolExecutor() as pool:
                count = len(list(pool.map(build, launches)))
        except CompilerMissingError as error:
            yield Line(f"compile for {architecture}", None, f"not checked: {error}")
            return
        except ValueError as error:
            yield Line(f"compile for {architecture}", False, str(error))
            continue
        yield Line(
            f"compile for {architecture}", True, f"{count} kernels in {time.perf_counter() - begun:.1f} s"
        )


def _line(where: str, rung: str, problem: Problem, out: torch.Tensor) -> Line:
    error = reference.relative_error(out, problem.wanted())
    limit = reference.TOLERANCES[problem.shape.dtype]
    shape = problem.shape
    what = f"{where}: {rung}, {ELEMENTS[shape.dtype]}, head_dim {shape.head_dim}, group {shape.group}"
    return Line(what, error <= limit, f"relative error {error:.1e} (limit {limit:.0e})")


def check_emulator() -> Iterator[Line]:
    """Every rung and prefill in the emulator, watched, against float64."""
    for dtype, head_dim, block_size, group, kv_heads, contexts in EMULATED:
        problem = make_problem(dtype, head_dim, block_size, group, kv_heads, contexts)
        args = (problem.query, problem.kv_layer, problem.block_tables, problem.context_lens)
        for rung in RUNGS:
            if rung == "mma" and dtype == torch.float32:
                continue
            try:
                out, _ = emulated.paged_decode(rung, *args, problem.scale, instrument=True)
            except CompilerMissingError as error:
                yield Line("emulator", None, f"not checked: {error}")
                return
            yield _line("emulator", rung, problem, out)
        if dtype != torch.float32:
            used = [c for c in contexts if c]
            queries = [1 + c // 2 for c in used]
            problem = make_problem(dtype, head_dim, block_size, group, kv_heads, used, queries)
            out, _ = emulated.paged_prefill(
                problem.query,
                problem.kv_layer,
                problem.block_tables,
                problem.context_lens,
                problem.query_start,
                problem.scale,
                instrument=True,
            )
            yield _line("emulator", "prefill", problem, out)


def check_gpu() -> Iterator[Line]:
    """Every rung and prefill on the GPU, where there is one, against float64."""
    if not torch.cuda.is_available():
        yield Line("GPU", None, "not checked: torch sees no CUDA device here")
        return
    name = torch.cuda.get_device_name()
    for dtype, head_dim, block_size, group, kv_heads, contexts in ON_GPU:
        problem = make_problem(dtype, head_dim, block_size, group, kv_heads, contexts, device="cuda")
        args = (problem.query, problem.kv_layer, problem.block_tables, problem.context_lens)
        workspace = ops.make_workspace(problem.shape, "cuda")
        for rung in RUNGS:
            if not (rung == "mma" and dtype == torch.float32):
                yield _line(name, rung, problem, ops.paged_decode(*args, workspace, problem.scale, rung))
        if dtype != torch.float32:
            used = [c for c in contexts if c]
            queries = [1 + c // 3 for c in used]
            problem = make_problem(dtype, head_dim, block_size, group, kv_heads, used, queries, device="cuda")
            out = ops.paged_prefill(
                problem.query,
                problem.kv_layer,
                problem.block_tables,
                problem.context_lens,
                problem.query_start,
                workspace,
                problem.scale,
            )
            yield _line(name, "prefill", problem, out)
