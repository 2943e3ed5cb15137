"""Run a CUDA C++ kernel on the CPU: build it with the host compiler, launch it on fibres.

The machinery is `cuda/emulator.h` and its runtime; this module compiles, passes arguments and turns program
counters into source lines. `nanopd_lab.kernels.run` is the door to use.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopd_lab.hostcc import find_compiler
from nanopd_lab.kernels.arguments import Region, Slot, bind, flat_launch_shape
from nanopd_lab.kernels.cache import cache_dir, key_of
from nanopd_lab.kernels.errors import CompilerMissingError, KernelCompileError, KernelFaultError
from nanopd_lab.kernels.report import KINDS, Counters, Finding, LineCounters, RunResult, WarpAccess, describe
from nanopd_lab.resources import cuda_dir

# More flags for the runtime, e.g. -DEMU_UCONTEXT: portable context switches instead of assembly.
RUNTIME_FLAGS_VARIABLE = "NANOPD_LAB_EMULATOR_FLAGS"
RUNTIME_SOURCES = ("emulator_run.cpp", "emulator_watch.cpp")
HEADERS = ("emulator.h", "emulator_internal.h")
# g++ ignores the section of a __shared__ variable in a template (GCC bug 41091). With a section for each variable the
# linker can put it where it belongs; a linker that can't read the script does without.
SHARED_OF_TEMPLATES = """SECTIONS { emu_shared : { PROVIDE_HIDDEN(__start_emu_shared = .); *(emu_shared) *(.bss._ZZ*)
    PROVIDE_HIDDEN(__stop_emu_shared = .); } } INSERT BEFORE .bss;
"""
# -fvisibility=hidden: else kernels in one process would share the variables of templates of the same name.
# -Werror=return-type: a function that ends without `return` runs on into whatever comes next.
# -fno-threadsafe-statics: a static variable is one of all threads, as any race on it shows.
# -fno-optimize-sibling-calls: a tail call would give a barrier the caller's line.
COMMON_FLAGS = (
    "-std=c++17", "-fPIC", "-Werror=return-type", "-fno-strict-aliasing", "-fno-optimize-sibling-calls",
    "-fdata-sections", "-fvisibility=hidden", "-fno-threadsafe-statics",
)  # fmt: skip
FAST_FLAGS = ("-O2", "-g1", "-ffp-contract=off")
WATCHED_FLAGS = ("-O1", "-g1", "-fsanitize=thread", "-fsanitize-coverage=trace-pc")
# Wrappers live here; a line in one of them is attributed to the kernel line that called it.
PLUMBING = frozenset({"emulator.h", "portable.h"})


class _Report(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int), ("size", ctypes.c_int),
        ("block", ctypes.c_int * 3), ("thread", ctypes.c_int * 3), ("other_thread", ctypes.c_int * 3),
        ("region", ctypes.c_int), ("waiting", ctypes.c_int), ("missing", ctypes.c_int),
        ("offset", ctypes.c_int64), ("pc", ctypes.c_uint64), ("other_pc", ctypes.c_uint64),
    )  # fmt: skip


class _Counter(ctypes.Structure):
    _fields_ = (
        ("pc", ctypes.c_uint64),
        ("space", ctypes.c_int),
        ("write", ctypes.c_int),
        *(
            (name, ctypes.c_uint64)
            for name in ("requests", "lanes", "bytes", "sectors", "passes", "conflicts")
        ),
    )


class _WarpAccess(ctypes.Structure):
    _fields_ = (
        ("pc", ctypes.c_uint64), ("space", ctypes.c_int), ("write", ctypes.c_int), ("region", ctypes.c_int),
        ("lanes", ctypes.c_uint32), ("bytes", ctypes.c_int32), ("offset", ctypes.c_int64 * 32),
    )  # fmt: skip


class _Totals(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("block_barriers", "warp_operations", "steps", "divergent_steps", "lane_steps")
    )


class _Region(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("initialised", ctypes.c_int))


def host_compiler() -> str:
    """Path of the C++ compiler. Raises CompilerMissingError."""
    found = find_compiler()
    if found is None:
        raise CompilerMissingError(
            "the emulator needs a C++ compiler and none of $CXX, g++, clang++, c++ was found; install g++ "
            "(Debian and Ubuntu: apt-get install g++)"
        )
    return found


@functools.lru_cache(maxsize=4)
def _compiler_version(compiler: str) -> str:
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    return told + platform.machine()


def _call_compiler(command: Sequence[str], name: str, source: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelCompileError(name, source, done.stderr)


@functools.lru_cache(maxsize=1)
def _runtime_objects() -> tuple[Path, ...]:
    """The runtime, compiled once and linked to every kernel."""
    compiler = host_compiler()
    flags = ["-std=c++17", "-O2", "-fPIC", *os.environ.get(RUNTIME_FLAGS_VARIABLE, "").split()]
    headers = "".join((cuda_dir() / name).read_text() for name in HEADERS)
    objects = []
    for name in RUNTIME_SOURCES:
        text = (cuda_dir() / name).read_text()
        target = cache_dir() / f"{key_of([text, headers, *flags, _compiler_version(compiler)])}.o"
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
                built = Path(folder) / "runtime.o"
                _call_compiler(
                    [compiler, *flags, "-c", str(cuda_dir() / name), "-o", str(built)],
                    name,
                    text,
                )
                built.replace(target)
        objects.append(target)
    return tuple(objects)


# `extern __shared__ T name[];` has no host equivalent: it becomes a pointer to the block's dynamic arena.
_DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\s*\d+\s*\)\s*|alignas\(\s*\d+\s*\)\s*)?([\w:\s]+?)\s+(\w+)\s*\[\s*\]\s*;"
)


def translate(source: str, kernel: str, name: str) -> str:
    """The source as the host compiler gets it: line numbers kept, an entry point appended."""
    text = _DYNAMIC_SHARED.sub(r"\1* \2 = reinterpret_cast<\1*>(emu::dynamic_shared());", source)
    return f'#include "emulator.h"\n#line 1 "{name}"\n{text}\n#line 1 "entry"\nEMU_ENTRY({kernel})\n'


def includes(source: str) -> str:
    """The text of all headers of `cuda/` that `source` includes, for the cache key."""
    seen: dict[str, str] = {}
    queue = [source]
    while queue:
        for header in re.findall(r'#include "([\w./]+)"', queue.pop()):
            path = cuda_dir() / header
            if header not in seen and path.exists():
                seen[header] = path.read_text()
                queue.append(seen[header])
    return "".join(seen[name] for name in sorted(seen))


@dataclass(frozen=True)
class EmulatedKernel:
    """A kernel built for this CPU."""

    name: str
    path: Path
    library: ctypes.CDLL
    watched: bool
    parameter_sizes: tuple[int, ...]
    parameter_kinds: str  # one letter each: p(ointer), i(nteger), f(loat)


@functools.lru_cache(maxsize=512)
def _build(
    source: str, kernel: str, defines: tuple[tuple[str, str], ...], watched: bool, name: str
) -> EmulatedKernel:
    compiler = host_compiler()
    flags = [*COMMON_FLAGS, *(WATCHED_FLAGS if watched else FAST_FLAGS), f"-I{cuda_dir()}"]
    flags += [f"-D{key}={value}" for key, value in defines]
    text = translate(source, kernel, name)
    runtime = _runtime_objects()
    key = key_of(
        [
            text,
            includes(text),
            " ".join(flags[: -len(defines) - 1]),
            SHARED_OF_TEMPLATES,
            str(defines),
            _compiler_version(compiler),
            *(path.name for path in runtime),
        ]
    )
    target = cache_dir() / f"{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            unit, built = Path(folder) / name, Path(folder) / "kernel.so"
            unit.write_text(text)
            made = Path(folder) / "kernel.o"
            _call_compiler([compiler, *flags, "-x", "c++", "-c", str(unit), "-o", str(made)], name, source)
            # Linked without -fsanitize: the runtime supplies the sanitizer's entry points itself.
            script = Path(folder) / "shared.ld"
            script.write_text(SHARED_OF_TEMPLATES)
            link = [compiler, "-shared", "-Wl,-Bsymbolic", "-o", str(built), str(made), *map(str, runtime)]
            try:
                _call_compiler([*link, f"-Wl,-T,{script}"], name, source)
            except KernelCompileError:
                _call_compiler(link, name, source)
            built.replace(target)
    library = ctypes.CDLL(str(target))
    library.emu_reports.restype = ctypes.POINTER(_Report)
    library.emu_totals.restype = ctypes.POINTER(_Totals)
    library.emu_base.restype = ctypes.c_uint64
    sizes, kinds = (ctypes.c_int * 64)(), ctypes.create_string_buffer(64)
    count = library.emu_parameters(sizes, kinds)
    return EmulatedKernel(name, target, library, watched, tuple(sizes[:count]), kinds.raw[:count].decode())


def build(
    source: str,
    kernel: str,
    defines: Mapping[str, object] | None = None,
    watched: bool = False,
    name: str = "kernel.cu",
) -> EmulatedKernel:
    """Compile `kernel` out of `source` for the emulator; from the disk cache when it is there.

    `watched` builds the instrumented version. Raises KernelCompileError with the compiler's log and the line.
    """
    return _build(
        source, kernel, tuple(sorted((k, str(v)) for k, v in (defines or {}).items())), watched, name
    )


def launch(
    built: EmulatedKernel,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    args: Sequence[Any],
    shared_bytes: int = 0,
    check: bool = True,
    max_steps: int = 2_000_000_000,
) -> RunResult:
    """Run one launch; array arguments are written in place, as through a pointer.

    Raises KernelFaultError on findings unless `check` is false; KernelArgumentError for arguments that don't
    fit.
    """
    grid3, block3 = flat_launch_shape(grid, block, shared_bytes)
    slots, regions = bind(
        args, built.parameter_kinds, built.parameter_sizes, built.name, guarded=built.watched
    )
    values = [_as_ctypes(slot, size) for slot, size in zip(slots, built.parameter_sizes, strict=True)]
    pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
    table = (_Region * max(1, len(regions)))(
        *(_Region(r.address, r.nbytes, int(r.initialised)) for r in regions)
    )
    begun = time.perf_counter()
    found = built.library.emu_launch(
        pointers, (ctypes.c_int * 3)(*grid3), (ctypes.c_int * 3)(*block3), ctypes.c_int64(shared_bytes),
        table, len(regions), int(built.watched), ctypes.c_uint64(max_steps),
    )  # fmt: skip
    elapsed_ms = 1e3 * (time.perf_counter() - begun)
    for region in regions:
        region.copy_back()
    findings, counters, accesses = _read_back(built, max(found, 0), regions)
    if found < 0:
        raise MemoryError(f"no memory for the stacks of {block3} threads")
    if findings and check:
        raise KernelFaultError(built.name, findings)
    outputs = tuple(slot.array for slot in slots if slot.array is not None)
    return RunResult(outputs, "emulator", elapsed_ms, counters, findings, accesses)


def _as_ctypes(slot: Slot, size: int) -> ctypes._SimpleCData[Any]:
    if slot.kind == "f":
        return (ctypes.c_float if size == 4 else ctypes.c_double)(slot.value)
    whole = int(slot.value) & ((1 << 8 * size) - 1)
    return {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}[size](whole)


def _read_back(
    built: EmulatedKernel, found: int, regions: Sequence[Region]
) -> tuple[tuple[Finding, ...], Counters, tuple[WarpAccess, ...]]:
    library = built.library
    reports = library.emu_reports()[:found] if found else []
    rows = ctypes.POINTER(_Counter)()
    count = library.emu_counters(ctypes.byref(rows)) if built.watched else 0
    counted = rows[:count] if count else []
    first = ctypes.POINTER(_WarpAccess)()
    count = library.emu_accesses(ctypes.byref(first)) if built.watched else 0
    kept = first[:count] if count else []
    addresses = {r.pc for r in reports} | {r.other_pc for r in reports if r.other_pc}
    addresses |= {c.pc for c in counted} | {a.pc for a in kept}
    lines = source_lines(built.path, addresses, library.emu_base())
    findings = []
    for r in reports:
        other_thread = tuple(r.other_thread) if r.other_thread[0] >= 0 else None
        other_line = lines[r.other_pc][1] if r.other_pc else None
        file, line = lines[r.pc]
        kind = KINDS[r.kind]
        if kind == "divergent barrier" and other_line == line:
            continue  # one barrier of the source that the compiler has duplicated
        detail = describe(
            kind, r.size, r.region, r.offset, [region.nbytes for region in regions], r.waiting, r.missing,
            {"thread": other_thread, "line": other_line},
        )  # fmt: skip
        findings.append(
            Finding(kind, file, line, tuple(r.thread), tuple(r.block), detail, other_line, other_thread)
        )
    grouped: dict[tuple[str, int, str, str], list[int]] = defaultdict(lambda: [0] * 6)
    for c in counted:
        space, kind = _space_and_kind(c)
        file, line = lines[c.pc]
        sums = grouped[file, line, space, kind]
        for i, name in enumerate(("requests", "lanes", "bytes", "sectors", "passes", "conflicts")):
            sums[i] += getattr(c, name)
    totals = library.emu_totals().contents
    counters = Counters(
        tuple(LineCounters(*key, *sums) for key, sums in sorted(grouped.items())),
        totals.block_barriers,
        totals.warp_operations,
        totals.steps,
        totals.divergent_steps,
        totals.lane_steps,
    )
    accesses = tuple(
        WarpAccess(
            *lines[a.pc], *_space_and_kind(a), a.region, a.bytes,
            tuple(a.offset[lane] if a.lanes >> lane & 1 else None for lane in range(32)),
        )
        for a in kept
    )  # fmt: skip
    return tuple(findings), counters, accesses


def _space_and_kind(row: _Counter | _WarpAccess) -> tuple[str, str]:
    kind = "atomic" if row.space >= 2 else "write" if row.write else "read"
    return "shared" if row.space & 1 else "global", kind


_line_cache: dict[tuple[Path, int], tuple[str, int]] = {}


def source_lines(library: Path, addresses: set[int], base: int) -> dict[int, tuple[str, int]]:
    """(file, line) of each program counter, through inlined wrappers, by binutils' addr2line."""
    missing = sorted(a for a in addresses if (library, a - base) not in _line_cache)
    if missing:
        tool = shutil.which("addr2line") or shutil.which("llvm-addr2line")
        if tool is None:
            raise CompilerMissingError("addr2line was not found; it comes with binutils, as the linker does")
        command = [tool, "-e", str(library), "-i", "-a", *(hex(a - base) for a in missing)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for address, block in zip(missing, re.split(r"^0x[0-9a-f]+\n", text, flags=re.M)[1:], strict=True):
            frames = [re.match(r"(.*):(\d+|\?)", frame) for frame in block.splitlines()]
            named = [
                (Path(f.group(1)).name, int(f.group(2)) if f.group(2) != "?" else 0) for f in frames if f
            ]
            own = [frame for frame in named if frame[0] not in PLUMBING]
            _line_cache[library, address - base] = (own or named or [("?", 0)])[0]
    return {a: _line_cache[library, a - base] for a in addresses}
