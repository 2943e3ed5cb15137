"""Run CUDA C++ that was written in a cell: `lab.cuda.run(source, ...)`, with or without a GPU.

The emulator comes first, everywhere: it watches each access, so a fault is a message with line and thread instead of
a dead process, and it counts what memory had to do. Where there is a GPU the same source then runs on it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from nanopd_lab.hostcc import find_compiler
from nanopd_lab.kernels.errors import KernelArgumentError, KernelCompileError, KernelFaultError
from nanopd_lab.kernels.report import Counters, Finding, RunResult, WarpAccess
from nanopd_lab.kernels.run import empty
from nanopd_lab.kernels.run import run as run_kernel
from nanopd_lab.kernels.sources import YOURS, definition, replaced
from nanopd_lab.lab.text import Table, card

if TYPE_CHECKING:
    from nanopd_lab.kernels.problems import Problem

__all__ = [
    "CudaError",
    "Result",
    "definition",
    "empty",
    "has_gpu",
    "missing",
    "replaced",
    "run",
    "rung_counters",
    "tile_access",
]

MAX_STEPS = 5_000_000  # about a second: a loop that never ends is found out soon


class CudaError(ValueError):
    """A source that does not compile, or a kernel that does something wrong; the message says where."""

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback."""
        return [f"CudaError: {self}"]


@dataclass(frozen=True)
class Result(RunResult):
    """A `RunResult` that shows what each line of the source asked of memory; `note` says why, if nothing ran."""

    source: str = ""
    note: str = ""

    @property
    def table(self) -> Table:
        """One row a line and kind of access."""
        rows = []
        for c in self.counters.lines:
            per_access = f"{c.sectors_per_request:.1f}" if c.space == "global" else ""
            conflicts = f"{c.conflicts:,}" if c.space == "shared" else ""
            line = line_of(self.source, c.line) if c.file == YOURS else c.file
            rows.append((str(c.line), line, f"{c.space} {c.kind}", f"{c.requests:,}", per_access, conflicts))
        header = ("line", "source", "memory", "warp accesses", "sectors each", "bank conflicts")
        return Table(header, tuple(rows), self.summary)

    @property
    def summary(self) -> str:
        """What matters of the whole launch, in a sentence."""
        c = self.counters
        if not c.steps:  # a GPU counts nothing
            return f"{self.device}: {self.elapsed_ms * 1e3:,.1f} µs; only the emulator counts what lines ask of memory."
        busy = c.lane_steps / (32 * c.steps) if c.steps else 1.0
        text = f"{self.device}: {32 * c.total('sectors', 'global'):,} bytes moved for {c.total('bytes', 'global'):,} "
        return f"{text}asked for; {busy:.0%} of the lanes busy; {c.bank_conflicts} bank conflicts."

    def __str__(self) -> str:
        faults = "\n".join(fault(finding, self.source) for finding in self.findings)
        return self.note or "\n".join(
            filter(None, [faults, str(self.table) if self.counters.steps else self.summary])
        )

    def _repr_html_(self) -> str:
        if self.note:
            return card("unchecked", escape(self.note))
        faults = [card("FAIL", escape(fault(finding, self.source))) for finding in self.findings]
        return "".join(faults) + (self.table._repr_html_() if self.counters.steps else escape(self.summary))

    __repr__ = __str__


def missing() -> str:
    """Why nothing can be emulated here, and what to install; empty if all is well."""
    if find_compiler():
        return ""
    return (
        "not run: the emulator needs a C++ compiler, and none of $CXX, g++, clang++, c++ was found. "
        "Install g++ (Debian and Ubuntu: apt install g++; macOS: xcode-select --install)."
    )


def has_gpu() -> bool:
    """True where torch sees a CUDA device, and `cuda-core` is here to compile for it."""
    import torch

    return torch.cuda.is_available() and find_spec("cuda") is not None and find_spec("cuda.core") is not None


def rung_counters(problem: Problem) -> dict[str, Counters]:
    """What the package's rungs ask of memory on one batch, counted in the emulator; empty without a C++ compiler."""
    from nanopd_lab.kernels import emulated
    from nanopd_lab.kernels.decode_launches import RUNGS

    if missing():
        return {}
    return {
        rung: emulated.paged_decode(rung, *problem.decode_args, instrument=True)[1].counters for rung in RUNGS
    }


def run(
    source: str,
    grid: int | Sequence[int] = 1,
    block: int | Sequence[int] = 32,
    args: Sequence[Any] = (),
    *,
    kernel: str | None = None,
    shared_bytes: int = 0,
    defines: Mapping[str, object] | None = None,
    device: str = "auto",
    check: bool = True,
    max_steps: int = MAX_STEPS,
) -> Result:
    """Compile CUDA C++ and launch its kernel once.

    Args:
        source: with one `__global__` function, or more and `kernel` to name the one that is launched
        args: numpy arrays, torch tensors, numbers, `lab.cuda.empty(n)` for an output that nobody has written
        device: "auto" emulates and then, where there is a GPU, runs there too and returns what came out of it;
            "emulator" and "cuda" do one of the two
        check: raise on a fault; otherwise the result shows it

    Raises:
        CudaError: it does not compile, races, reads or writes out of bounds or what nobody wrote, or never ends
        KernelArgumentError: the arguments or the launch don't fit
    """
    names = re.findall(
        r"__global__[^;{(]*?(?:__launch_bounds__\([^)]*\))?\s*\b(?!__launch)(\w+)\s*\(", _bare(source)
    )
    if kernel is None and len(names) != 1:
        found = ", ".join(names) or "none"
        raise KernelArgumentError(
            f"the source has {len(names)} __global__ functions ({found}); name one: kernel="
        )
    kernel = kernel or names[0]
    options: dict[str, Any] = {"shared_bytes": shared_bytes, "defines": defines, "name": YOURS}
    try:
        if device == "cuda":
            return _result(run_kernel(source, kernel, grid, block, args, device="cuda", **options), source)
        if note := missing():
            return Result((), "nothing", 0.0, source=source, note=note)
        also_gpu = device == "auto" and has_gpu()
        mine = copy.deepcopy(list(args)) if also_gpu else args
        emulated = run_kernel(
            source, kernel, grid, block, mine, device="emulator", check=check, max_steps=max_steps, **options
        )
        if not also_gpu or emulated.findings:
            return _result(emulated, source)
        on_gpu = run_kernel(source, kernel, grid, block, args, device="cuda", **options)
    except KernelCompileError as error:
        raise CudaError(f"does not compile\n{compiler_says(error, source)}") from None
    except KernelFaultError as error:
        raise CudaError("\n".join(fault(finding, source) for finding in error.findings)) from None
    return _result(on_gpu, source, emulated)


def tile_access(headers: Mapping[str, str]) -> WarpAccess | None:
    """What a warp of rung (d) copies in its first turn: bytes of a tile of K, 16 rows of 256, in bf16.

    Counted in the emulator with `headers` in place (see `replaced`); None without a C++ compiler.
    """
    import torch

    from nanopd_lab.kernels import emulated
    from nanopd_lab.kernels.problems import make_problem

    if missing():
        return None
    problem = make_problem(torch.bfloat16, 128, 16, group=1, kv_heads=1, contexts=[16])
    _, result = emulated.paged_decode("split", *problem.decode_args, instrument=True, headers=headers)
    layer, block = problem.kv_layer, int(problem.block_tables[0, 0])
    begin = int(layer.storage_offset() + block * layer.stride(0)) * layer.element_size()
    copies = [a for a in result.accesses if (a.space, a.kind, a.bytes) == ("global", "read", 16)]
    first = next(a for a in copies if a.line == min(copy.line for copy in copies))
    return replace(first, offsets=tuple(None if o is None else o - begin for o in first.offsets))


def _result(found: RunResult, source: str, counted: RunResult | None = None) -> Result:
    counted = counted or found
    return Result(
        found.outputs,
        found.device,
        found.elapsed_ms,
        counted.counters,
        counted.findings,
        counted.accesses,
        source,
    )


def line_of(source: str, number: int) -> str:
    """Line `number` of the source, counted from 1, without its indentation."""
    lines = source.splitlines()
    return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def place(file: str, line: int, source: str) -> str:
    """'line 3: `x += y;`' of the learner's source, or file and line of the package's."""
    return f"line {line}: {line_of(source, line)}" if file == YOURS else f"{file}, line {line}"


def thread_of(finding: Finding) -> str:
    """'thread 5 of block 0', with as many numbers as matter."""

    def short(numbers: Iterable[int]) -> str:
        x, y, z = numbers
        return str(x) if y == z == 0 else f"({x}, {y}, {z})"

    return f"thread {short(finding.thread)} of block {short(finding.block)}"


def fault(finding: Finding, source: str) -> str:
    """One finding on two lines."""
    detail = re.sub(r"\((\d+), 0, 0\)", r"\1", finding.detail)
    where = place(finding.file, finding.line, source)
    return f"{finding.kind} at {where}\n    {thread_of(finding)}: {detail}"


def compiler_says(error: KernelCompileError, source: str, most: int = 3) -> str:
    """The compiler's errors, each with the learner's line."""
    # g++ and clang: "yours.cu:3:5: error: ...";  NVRTC: "yours.cu(3): error: ..."
    found = re.findall(r"([\w.]+)[:(](\d+)(?::\d+|\))?: (?:fatal )?error:? (.*)", error.log)
    own = [row for row in found if row[0] == YOURS] or found
    lines = [f"{place(file, int(line), source)}\n    {message[:130]}" for file, line, message in own[:most]]
    return "\n".join(lines) or error.log.strip()[-400:]


def _bare(source: str) -> str:
    """Without comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.S)


def is_stub(source: str) -> bool:
    """True if it still has its `#error "your turn"`."""
    return re.search(r"^\s*#\s*error\b", _bare(source), re.M) is not None


def mentions(source: str, name: str) -> bool:
    """True if `name(` occurs outside comments."""
    return re.search(rf"\b{name}\s*\(", _bare(source)) is not None
