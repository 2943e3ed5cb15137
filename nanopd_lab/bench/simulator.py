"""`nanopd-lab bench-simulator`: how fast the simulator is on this computer, start-up and import included.

Every cell is a command of its own, as a user would give it, in a process of its own; Python has compiled the modules to
bytecode once before. Other checkouts can be timed beside this one, and this one compiled to C (`sim.compiled`): each
round runs them all, one after the other, so that what slows the computer slows them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    _Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SCHEMA = "nanopd-lab/simulator-speed/1"
PER_WORKER = 2.5  # requests a second


@dataclass(frozen=True)
class Cell:
    """So many requests of Azure-like lengths over so many H100s with Qwen3-8B, 2.5 a second and worker."""

    requests: int
    workers: int
    policy: str

    @classmethod
    def parse(cls, text: str) -> Cell:
        """From `10000:8:4p4d`. Raises ValueError."""
        parts = text.split(":")
        if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts[:2]):
            raise ValueError(f"{text!r} is no cell; write requests:workers:policy, as 10000:8:4p4d")
        return cls(int(parts[0]), int(parts[1]), parts[2])

    @property
    def flags(self) -> list[str]:
        """Of `nanopd-lab simulate`."""
        given = {
            "hardware": "h100",
            "model": "qwen3-8b",
            "workers": self.workers,
            "policy": self.policy,
            "num-prompts": self.requests,
            "dataset-name": "azure-like",
            "request-rate": PER_WORKER * self.workers,
        }
        return [text for name, value in given.items() for text in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Run:
    """What the operating system says of one: seconds by the clock, of the processor, and the most memory."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def measure(cell: Cell, root: Path, bytecode: Path | None = None) -> Run:
    """Simulate it once with the package that lies under `root`.

    Args:
        bytecode: folder where Python keeps that of modules; None: where it usually does

    Raises:
        RuntimeError: the command failed; with what it said.
    """
    command = [
        sys.executable,
        "-c",
        "import sys; from nanopd_lab.cli import main; sys.exit(main())",
        "simulate",
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    if bytecode is not None:
        environment |= {"PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryFile() as said:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [*command, *cell.flags], cwd=root, env=environment, stdout=said, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(
                f"{shlex.join(cell.flags)} failed: {said.read().decode(errors='replace')[-2000:]}"
            )
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def compare(cells: Sequence[Cell], roots: dict[str, Path], rounds: int) -> list[dict[str, Any]]:
    """For each cell, the runs of each of `roots` (by label) and the median of their processor times."""
    with tempfile.TemporaryDirectory() as bytecode:
        for root in roots.values():
            measure(Cell(1, 1, "collocated"), root, Path(bytecode))
        return _compare(cells, roots, rounds, Path(bytecode))


def _compare(
    cells: Sequence[Cell], roots: dict[str, Path], rounds: int, bytecode: Path
) -> list[dict[str, Any]]:
    found = []
    for cell in cells:
        runs: dict[str, list[Run]] = {label: [] for label in roots}
        for _ in range(rounds):
            for label, root in roots.items():
                runs[label].append(measure(cell, root, bytecode))
                print(f"{cell}, {label}: {runs[label][-1]}", flush=True)
        medians = {label: statistics.median(run.cpu_s for run in each) for label, each in runs.items()}
        found.append(
            {
                **asdict(cell),
                "command": shlex.join(["nanopd-lab", "simulate", *cell.flags]),
                "median_cpu_s": medians,
                "requests_per_cpu_s": {label: cell.requests / cpu_s for label, cpu_s in medians.items()},
                "runs": {label: [asdict(run) for run in each] for label, each in runs.items()},
            }
        )
    return found


def _cell(text: str) -> Cell:
    try:
        return Cell.parse(text)
    except ValueError as error:  # of which argparse would say that the value is invalid, and no more
        raise argparse.ArgumentTypeError(str(error)) from None


def register(subparsers: _Subparsers) -> None:
    """Add the command; its parser sets `run`."""
    parser = subparsers.add_parser(
        "bench-simulator", help="how fast the simulator is on this computer, with its start"
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        type=_cell,
        default=[Cell(10_000, 8, "collocated"), Cell(10_000, 8, "4p4d")],
        metavar="REQUESTS:WORKERS:POLICY",
        help="default: 10000:8:collocated 10000:8:4p4d",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each cell")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="LABEL=FOLDER",
        help="other checkouts, timed in the same rounds",
    )
    parser.add_argument(
        "--compiled", action="store_true", help="this checkout compiled to C as well (see compile-simulator)"
    )
    parser.add_argument("--result-filename", type=Path, help="write the record there, as JSON")
    parser.set_defaults(run=run)
    parser = subparsers.add_parser(
        "compile-simulator",
        help="compile the simulator to C, by mypyc, in the cache; prints the folder to put into PYTHONPATH",
    )
    parser.set_defaults(run=_compile)


def _compile(args: argparse.Namespace) -> int:
    from nanopd_lab.sim.compiled import compiled_root

    print(compiled_root())
    return 0


def run(args: argparse.Namespace) -> int:
    """Measure, print, write the record."""
    from nanopd_lab.provenance import provenance

    if args.rounds < 1:
        raise ValueError(f"rounds is {args.rounds}; it must be at least 1")
    roots = {"here": Path(__file__).resolve().parents[2]}
    for text in args.beside:
        label, _, folder = text.partition("=")
        if not (Path(folder) / "nanopd_lab").is_dir():
            raise ValueError(
                f"{text!r} names no checkout; write LABEL=FOLDER, of a folder with nanopd_lab in it"
            )
        roots[label] = Path(folder).resolve()
    if args.compiled:
        from nanopd_lab.sim.compiled import compiled_root

        roots["compiled"] = compiled_root()
    cells = compare(args.cells, roots, args.rounds)
    for cell in cells:
        each = ", ".join(f"{label} {cpu_s:.2f} s" for label, cpu_s in cell["median_cpu_s"].items())
        print(f"{cell['requests']:,} requests, {cell['workers']} workers, {cell['policy']}: {each} of CPU")
    if args.result_filename:
        found = provenance()
        found["command"] = (
            "nanopd-lab bench-simulator"  # the folders of other checkouts are nobody's business
        )
        record = {"schema": SCHEMA, "rounds": args.rounds, "cells": cells, "provenance": found}
        args.result_filename.write_text(json.dumps(record, indent=1) + "\n")
    return 0
