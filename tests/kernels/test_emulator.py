"""The emulator itself: planted faults are reported with line and thread, counters are exact."""

from __future__ import annotations

import platform
import signal

import numpy as np
import pytest

from nanopd_lab.kernels import (
    KernelArgumentError,
    KernelCompileError,
    KernelFaultError,
    empty,
    emulator,
    run,
)

FLOATS = np.arange(1024, dtype=np.float32)


def launch(body: str, block: int = 64, shared_bytes: int = 0, grid: int = 1, n: int = 64, **options: object):
    source = f"""__global__ void kernel(const float* x, float* y, int n) {{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
{body}
}}"""
    return run(
        source,
        "kernel",
        grid,
        block,
        [FLOATS[:n].copy(), empty(n), n],
        device="emulator",
        shared_bytes=shared_bytes,
        **options,
    )  # type: ignore[arg-type]


def fault(body: str, kind: str, line: int, **options: object):
    """The one finding of that kind; body lines are numbered from 3."""
    with pytest.raises(KernelFaultError) as caught:
        launch(body, **options)
    found = [f for f in caught.value.findings if f.kind == kind]
    assert found, f"no {kind} among: {caught.value}"
    assert found[0].line == line
    assert f"kernel.cu:{line}" in str(caught.value)
    return found[0]


def test_out_of_bounds_read() -> None:
    found = fault("    y[i] = 0;\n    if (i == 5) y[i] = x[n + 3];", "out-of-bounds read", 4)
    assert found.thread == (5, 0, 0)
    assert "byte 268 of argument 0 (256 bytes)" in found.detail


def test_out_of_bounds_write_before_the_array() -> None:
    found = fault("    y[i - 1] = x[i];", "out-of-bounds write", 3)
    assert found.thread == (0, 0, 0)
    assert "byte -4 of argument 1" in found.detail


def test_out_of_bounds_of_shared_memory() -> None:
    found = fault(
        "    extern __shared__ float s[];\n    s[i] = x[i];\n    y[i] = s[i];",
        "out-of-bounds write",
        4,
        shared_bytes=128,
    )
    assert found.thread == (32, 0, 0)


def test_wild_pointer_does_not_crash_the_process() -> None:
    fault("    y[i] = *(const float*)(0x10 + 4 * i);", "out-of-bounds read", 3)


def test_uninitialised_shared_memory() -> None:
    found = fault(
        "    __shared__ float s[64];\n    if (i != 9) s[i] = x[i];\n    y[i] = s[i];", "uninitialised read", 5
    )
    assert found.thread == (9, 0, 0)


def test_shared_memory_of_a_template_is_watched_too() -> None:
    source = """template <int N> __device__ float turned(float x) {
    __shared__ float s[N];
    s[threadIdx.x] = x;
    {barrier}
    return s[N - 1 - threadIdx.x];
}
__global__ void kernel(const float* x, float* y) { y[threadIdx.x] = turned<64>(x[threadIdx.x]); }"""
    args = [FLOATS[:64].copy(), empty(64)]
    with pytest.raises(KernelFaultError, match=r"race at kernel.cu:[35]"):
        run(source.replace("{barrier}", ""), "kernel", 1, 64, args, device="emulator")
    good = run(source.replace("{barrier}", "__syncthreads();"), "kernel", 1, 64, args, device="emulator")
    assert np.array_equal(good.outputs[1], FLOATS[63::-1])
    assert good.counters.total("requests", "shared") == 4
    stale = run(
        source.replace("{barrier}", "").replace("s[threadIdx.x] = x;", ""),
        "kernel",
        1,
        64,
        args,
        device="emulator",
        instrument=False,
    )
    assert np.isnan(stale.outputs[1]).all()


def test_the_first_warps_accesses_are_kept_lane_by_lane() -> None:
    result = launch("    if (i % 2 && i < 32) y[i] = x[2 * i];", block=64, n=64, grid=1)
    read, write = sorted(result.accesses, key=lambda access: access.kind)
    assert (read.line, read.space, read.argument, read.bytes) == (3, "global", 0, 4)
    assert read.offsets == tuple(8 * i if i % 2 else None for i in range(32))
    assert write.offsets == tuple(4 * i if i % 2 else None for i in range(32))
    assert (write.argument, len(read.sectors), write.sectors) == (1, 8, (0, 1, 2, 3))
    assert len(read.sectors) == next(c.sectors for c in result.counters.lines if c.kind == "read")


def test_uninitialised_output() -> None:
    fault("    y[i] += x[i];", "uninitialised read", 3)


def race(body: str, lines: tuple[int, int], **options: object) -> None:
    """A race between these two lines; which of them comes second depends on the order of the threads."""
    with pytest.raises(KernelFaultError) as caught:
        launch(body, **options)
    races = [f for f in caught.value.findings if f.kind == "race"]
    assert races
    assert all(sorted((f.line, f.other_line)) == sorted(lines) for f in races)
    assert all(f.other_thread is None or f.other_thread != f.thread for f in races)


def test_race_where_a_barrier_is_missing() -> None:
    body = "    __shared__ float s[64];\n    s[i] = x[i];\n    {barrier}\n    y[i] = s[63 - i];"
    race(body.format(barrier=""), (4, 6))
    assert launch(body.format(barrier="__syncthreads();")).findings == ()


def test_race_within_a_warp_and_its_warp_barrier() -> None:
    body = "    __shared__ float s[32];\n    s[i] = x[i];\n    {barrier}\n    y[i] = s[31 - i];"
    race(body.format(barrier=""), (4, 6), block=32)
    assert launch(body.format(barrier="__syncwarp();"), block=32).findings == ()
    # A warp barrier does not order two warps.
    wide = "    __shared__ float s[64];\n    s[i] = x[i];\n    __syncwarp();\n    y[i] = s[63 - i];"
    race(wide, (4, 6), block=64)


def test_write_after_read_race() -> None:
    body = (
        "    __shared__ float s[64];\n    s[i] = x[i];\n    __syncthreads();\n"
        "    float v = s[63 - i];\n    {barrier}\n    s[i] = 2 * v;\n    y[i] = v;"
    )
    race(body.format(barrier=""), (6, 8))
    assert launch(body.format(barrier="__syncthreads();")).findings == ()


def test_two_blocks_write_one_place() -> None:
    race("    y[threadIdx.x] = x[i];", (3, 3), block=32, grid=2)
    assert launch("    if (i == 0) y[0] = 0; if (i > 0) y[i] = x[i];", block=32, grid=2).findings == ()


def test_atomics_are_no_race() -> None:
    source = "__global__ void count(int* n) { atomicAdd(n, 1); }"
    result = run(source, "count", 3, 50, [np.zeros(1, np.int32)], device="emulator")
    assert result.outputs[0][0] == 150


def test_asynchronous_copy_without_a_wait() -> None:
    source = """#include "portable.h"
extern "C" __global__ void copy(const float* x, float* y) {
    __shared__ __align__(16) float s[128];
    async_copy16(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
    async_commit();
    WAIT
    __syncwarp();
    y[threadIdx.x] = s[127 - threadIdx.x];
}"""
    args = [FLOATS[:128].copy(), empty(32)]
    good = run(source.replace("WAIT", "async_wait<0>();"), "copy", 1, 32, args, device="emulator")
    assert np.array_equal(good.outputs[1], FLOATS[127:95:-1])
    with pytest.raises(KernelFaultError, match=r"uninitialised read at kernel.cu:8"):
        run(source.replace("WAIT", ""), "copy", 1, 32, args, device="emulator")


def test_block_deadlock() -> None:
    found = fault("    if (i < 40) __syncthreads();\n    y[i] = x[i];", "block deadlock", 3)
    assert "40 threads wait" in found.detail
    assert "24 never reach it" in found.detail


def test_a_thread_that_has_returned_never_reaches_the_barrier() -> None:
    fault("    if (i == 63) return;\n    __syncthreads();\n    y[i] = x[i];", "block deadlock", 4)


def test_warp_deadlock_is_told_from_a_block_deadlock() -> None:
    found = fault(
        "    float v = x[i];\n    if (i % 32 < 16) v += __shfl_xor_sync(0xffffffffu, v, 1);\n    y[i] = v;",
        "warp deadlock",
        4,
    )
    assert "16 lanes wait" in found.detail


def test_partial_masks_meet_among_themselves() -> None:
    body = (
        "    float v = x[i];\n    if (i % 32 < 16) v += __shfl_xor_sync(0xffffu, v, 1);\n"
        "    else v += __shfl_xor_sync(0xffff0000u, v, 2);\n    y[i] = v;"
    )
    y = launch(body).outputs[1]
    lanes = np.arange(64)
    partner = np.where(lanes % 32 < 16, lanes ^ 1, lanes ^ 2)
    assert np.array_equal(y, FLOATS[:64] + FLOATS[partner])


def test_barriers_at_different_lines() -> None:
    fault(
        "    if (i < 32) __syncthreads();\n    else __syncthreads();\n    y[i] = x[i];",
        "divergent barrier",
        4,
    )


def test_endless_loop_is_stopped() -> None:
    with pytest.raises(KernelFaultError, match="too many steps"):
        launch("    volatile int k = n;\n    while (k > 0) {}\n    y[i] = 0;", max_steps=100_000)


def test_a_kernel_that_breaks_off_does_not_take_the_process_with_it() -> None:
    handler = signal.getsignal(signal.SIGFPE)
    found = fault("    y[i] = 1 / (n - n);", "crash", 3)
    assert "an integer was divided by zero" in found.detail
    with pytest.raises(KernelFaultError, match="SIGSEGV"):
        launch("    void (*f)() = reinterpret_cast<void (*)()>(8);\n    f();")
    assert signal.getsignal(signal.SIGFPE) is handler


def test_misaligned_vector_access() -> None:
    fault("    if (i == 0) *(float4*)(y + 1) = make_float4(1, 2, 3, 4);", "misaligned access", 3)


@pytest.mark.parametrize(
    ("index", "sectors"),
    [("i", 4), ("(i * 2) % 1024", 8), ("(i * 8) % 1024", 32), ("0", 1), ("(i + 1) % 1024", 5)],
)
def test_sectors_per_request(index: str, sectors: int) -> None:
    counters = launch(f"    if (i < 32)\n        y[i] = x[{index}];", block=32, n=1024).counters
    (line,) = [c for c in counters.lines if c.kind == "read"]
    assert (line.line, line.requests, line.lanes, line.bytes, line.sectors) == (4, 1, 32, 128, sectors)


def test_vector_loads_stay_whole() -> None:
    counters = launch("    ((float4*)y)[i] = ((const float4*)x)[i];", block=32, n=128).counters
    read, write = sorted(counters.lines, key=lambda c: c.kind)
    assert (read.requests, read.bytes, read.sectors) == (1, 512, 16)
    assert (write.requests, write.bytes, write.sectors) == (1, 512, 16)
    assert counters.coalescing == 1.0


@pytest.mark.parametrize(("stride", "conflicts"), [(1, 0), (2, 1), (4, 3), (32, 31), (33, 0), (0, 0)])
def test_bank_conflicts(stride: int, conflicts: int) -> None:
    body = (
        f"    extern __shared__ float s[];\n"
        f"    s[{stride} * i] = x[{'0' if stride == 0 else 'i'}];\n    y[i] = 0;"
    )
    if stride == 0:  # a broadcast read, after one write
        body = (
            "    extern __shared__ float s[];\n    if (i == 0) s[0] = x[0];\n    __syncwarp();\n"
            "    y[i] = s[0];"
        )
    counters = launch(body, block=32, n=32, shared_bytes=33 * 32 * 4).counters
    assert counters.bank_conflicts == conflicts


def test_divergence() -> None:
    uniform = launch("    if (i < 32) y[i] = x[i]; else y[i] = 2 * x[i] + sqrtf(x[i]);").counters
    assert uniform.divergent_steps == 0
    split = launch(
        "    if (i % 2) y[i] = x[i]; else y[i] = sqrtf(x[i] * x[63 - i]) + y[i ^ 0] * 0;", check=False
    ).counters
    assert split.divergent_steps > 0
    assert split.lane_steps < 32 * split.steps


def test_barriers_and_warp_operations_are_counted() -> None:
    body = (
        "    float v = x[i];\n    for (int k = 0; k < 5; ++k) v += __shfl_xor_sync(~0u, v, 1);\n"
        "    __syncthreads();\n    y[i] = v;"
    )
    counters = launch(body, grid=2, block=32).counters
    assert (counters.block_barriers, counters.warp_operations) == (2, 10)


def test_warp_votes_and_shuffles() -> None:
    body = """    float v = __shfl_down_sync(~0u, x[i], 3) + __shfl_up_sync(~0u, x[i], 2, 8);
    v += __shfl_sync(~0u, x[i], 5) + __popc(__ballot_sync(~0u, i % 3 == 0));
    y[i] = v + 100 * __any_sync(~0u, i == 7) + 1000 * __all_sync(~0u, i >= 0);"""
    y = launch(body, block=32, n=32).outputs[1]
    i = np.arange(32)
    down, up = np.where(i + 3 < 32, i + 3, i), np.where(i % 8 >= 2, i - 2, i)
    assert np.array_equal(y, (down + up + 5 + 11 + 100 + 1000).astype(np.float32))


def test_fast_mode_gives_the_same_result_and_poisons_shared_memory() -> None:
    assert np.array_equal(launch("    y[i] = 2 * x[i];", instrument=False).outputs[1], 2 * FLOATS[:64])
    stale = launch(
        "    __shared__ float s[64];\n    if (i) s[i] = x[i];\n    __syncthreads();\n    y[i] = s[i];",
        instrument=False,
    )
    assert np.isnan(stale.outputs[1][0])
    assert np.array_equal(stale.outputs[1][1:], FLOATS[1:64])


def test_portable_context_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on processors without an assembly switch gives the same."""
    monkeypatch.setenv(emulator.RUNTIME_FLAGS_VARIABLE, "-DEMU_UCONTEXT")
    emulator._runtime_objects.cache_clear()
    emulator._build.cache_clear()
    body = "    __shared__ float s[64];\n    s[i] = x[i];\n    __syncthreads();\n    y[i] = s[63 - i];"
    try:
        result = launch(body)
        assert b"swapcontext" in emulator._runtime_objects()[0].read_bytes()
    finally:
        monkeypatch.undo()
        emulator._runtime_objects.cache_clear()
        emulator._build.cache_clear()
    assert b"swapcontext" not in emulator._runtime_objects()[0].read_bytes() or platform.machine() not in (
        "x86_64",
        "aarch64",
    )
    assert np.array_equal(result.outputs[1], FLOATS[63::-1])
    assert result.counters.block_barriers == 1


def test_compile_error_names_the_line() -> None:
    with pytest.raises(KernelCompileError, match=r"at line 4: `y\[i\] = undefined_name;`") as caught:
        launch("    // a comment\n    y[i] = undefined_name;")
    assert caught.value.line == 4
    assert "undefined_name" in caught.value.log


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": [FLOATS]}, "takes 3 arguments, 1 were given"),
        ({"args": [1.5, FLOATS, 3]}, "must be an array, not float"),
        ({"args": [FLOATS, FLOATS, FLOATS]}, "argument 2 of kernel.cu must be an integer"),
        ({"args": [FLOATS, FLOATS, 1 << 40]}, "doesn't fit in 4 bytes"),
        ({"args": [FLOATS[::2], FLOATS, 3]}, "must be C-contiguous"),
        ({"block": 2048}, "has 2048 threads; a block has at most 1024"),
        ({"grid": 0}, "each at least 1"),
        ({"shared_bytes": 1 << 20}, "at most"),
        ({"device": "tpu"}, "use 'auto', 'emulator' or 'cuda'"),
    ],
)
def test_bad_launches(change: dict, message: str) -> None:
    given = {"grid": 1, "block": 32, "args": [FLOATS, FLOATS.copy(), 3], "device": "emulator", **change}
    source = "__global__ void kernel(const float* x, float* y, int n) {}"
    with pytest.raises(KernelArgumentError, match=message):
        run(source, "kernel", given.pop("grid"), given.pop("block"), given.pop("args"), **given)
