"""What a run of a kernel gives back: outputs, counters per source line, findings."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = (
    "out-of-bounds read",
    "out-of-bounds write",
    "uninitialised read",
    "race",
    "misaligned access",
    "block deadlock",
    "warp deadlock",
    "divergent barrier",
    "shuffle from an absent lane",
    "too many steps",
    "crash",
)


@dataclass(frozen=True)
class Finding:
    """One fault: what, where (file and line), which thread, and what to compare it with."""

    kind: str
    file: str
    line: int
    thread: tuple[int, int, int]
    block: tuple[int, int, int]
    detail: str
    other_line: int | None = None
    other_thread: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}, thread {self.thread} of block {self.block}"
        return f"{self.kind} at {where}: {self.detail}"


@dataclass(frozen=True)
class LineCounters:
    """All accesses that one source line made to one kind of memory ("global" or "shared").

    `requests` counts warp-wide accesses, `lanes` the threads in them and `bytes` what they asked for.
    `sectors` are the 32-byte pieces of global memory moved for them; `passes` the turns that shared memory
    needed, of which `conflicts` are due to lanes wanting different words of one bank.
    """

    file: str
    line: int
    space: str
    kind: str
    requests: int
    lanes: int
    bytes: int
    sectors: int
    passes: int
    conflicts: int

    @property
    def sectors_per_request(self) -> float:
        """4 for a warp that reads 32 neighbouring floats, 32 for one that strides."""
        return self.sectors / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class WarpAccess:
    """One access of a warp, lane by lane.

    `argument` is the index of the array argument (-1: shared memory), `bytes` what each lane asked for, and
    `offsets` the 32 lanes' positions in it in bytes, None for a lane that took no part.
    """

    file: str
    line: int
    space: str
    kind: str
    argument: int
    bytes: int
    offsets: tuple[int | None, ...]

    @property
    def sectors(self) -> tuple[int, ...]:
        """The 32-byte sectors touched, as numbers counted from the array's beginning, in order."""
        touched = {
            sector
            for offset in self.offsets
            if offset is not None
            for sector in range(offset // 32, (offset + self.bytes - 1) // 32 + 1)
        }
        return tuple(sorted(touched))


@dataclass(frozen=True)
class Counters:
    """What a launch did, by line and in total. `steps` are basic blocks executed by a warp."""

    lines: tuple[LineCounters, ...] = ()
    block_barriers: int = 0
    warp_operations: int = 0
    steps: int = 0
    divergent_steps: int = 0
    lane_steps: int = 0

    def total(self, name: str, space: str | None = None, kind: str | None = None) -> int:
        """Sum of the field `name` over the lines, of one space ("global", "shared") or kind ("read",
        "write")."""
        return sum(
            getattr(line, name)
            for line in self.lines
            if (space is None or line.space == space) and (kind is None or line.kind == kind)
        )

    @property
    def coalescing(self) -> float:
        """Bytes asked for over bytes moved from and to global memory: 1 is perfect, 1/8 is a stride of
        floats."""
        moved = 32 * self.total("sectors", "global")
        return self.total("bytes", "global") / moved if moved else 1.0

    @property
    def bank_conflicts(self) -> int:
        """Extra turns of shared memory."""
        return self.total("conflicts", "shared")

    def table(self) -> str:
        """The lines as text, one a row."""
        head = (
            f"{'line':>25} {'space':<7} {'kind':<6} {'requests':>9} {'bytes':>11} {'sectors':>9} "
            f"{'conflicts':>9}"
        )
        rows = []
        for c in sorted(self.lines, key=lambda c: (c.file, c.line)):
            where = f"{c.file}:{c.line}"
            rows.append(
                f"{where:>25} {c.space:<7} {c.kind:<6} {c.requests:>9} {c.bytes:>11} {c.sectors:>9} "
                f"{c.conflicts:>9}"
            )
        return "\n".join([head, *rows])


@dataclass(frozen=True)
class RunResult:
    """Outputs (the array arguments, in their order, as the kernel left them) and what was seen on the way.

    `device` is "emulator" or the GPU's name; the rest is empty on a GPU and in the fast mode. `accesses` are the
    first 512 of warp 0 of block 0, in the order in which the warp's lanes met.
    """

    outputs: tuple[Any, ...]
    device: str
    elapsed_ms: float
    counters: Counters = field(default_factory=Counters)
    findings: tuple[Finding, ...] = ()
    accesses: tuple[WarpAccess, ...] = ()


def describe(
    kind: str,
    size: int,
    region: int,
    offset: int,
    region_bytes: Sequence[int],
    waiting: int,
    missing: int,
    other: Mapping[str, Any] | None,
) -> str:
    """The sentence of a finding, with the value, the limit and, where it helps, the way out."""
    where = (
        f"argument {region} ({region_bytes[region]} bytes)"
        if region >= 0
        else "shared memory"
        if region == -1
        else "no argument"
    )
    at = f"{size} bytes at byte {offset} of {where}"
    second = ""
    if other:
        second = (
            f"thread {other['thread']}"
            if other["thread"]
            else "a thread of another block, or several threads"
        )
        if other["line"]:
            second += f" at line {other['line']}"
    if kind.startswith("out-of-bounds"):
        return f"{at}" if region >= -1 else f"{size} bytes that belong to no argument and no shared memory"
    if kind == "uninitialised read":
        return f"{at} that nobody has written"
    if kind == "race":
        return f"{at}, also touched by {second}; no barrier orders the two"
    if kind == "misaligned access":
        return f"{at}: the address is not a multiple of {size}"
    if kind == "block deadlock":
        return (
            f"{waiting} threads wait at this __syncthreads(), {missing} never reach it, among them {second}"
        )
    if kind == "warp deadlock":
        return (
            f"{waiting} lanes wait at this warp operation, {missing} of its mask never reach it, "
            f"among them {second}"
        )
    if kind == "divergent barrier":
        return f"this __syncthreads() meets another one: {second}; all threads must meet at one barrier"
    if kind == "shuffle from an absent lane":
        return f"reads from lane {offset}, which is not in the mask"
    if kind == "crash" and size == signal.SIGFPE:
        return "an integer was divided by zero"
    if kind == "crash":
        name = signal.Signals(size).name
        return f"the program broke off ({name}): does every path end in a `return`? is every address right?"
    return "stopped after the allowed number of steps: does a loop end? (raise max_steps if it does)"
