"""What a device can do at most, measured: bytes read and copied a second, FLOPs of a matrix product a second.

    nanopd-lab ceilings --device cuda --result-filename ceilings.json

Every roofline and every "percent of the roof" in this project stands on these. The best of several rounds
counts: a ceiling is what is possible, and anything else that runs only takes away from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanopd_lab.cost.roofline import Roof
from nanopd_lab.provenance import provenance

SCHEMA = "nanopd-lab/ceilings/1"
# Larger than any cache: a CPU's last level, a GPU's L2.
READ_BYTES = {"cpu": 1 << 29, "cuda": 2 << 30}
# Side of the square matrices. Big enough that a better shape would not help.
MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
LONG_S = 0.1  # for one product on a CPU: one of twice the side takes eight times as long


@dataclass(frozen=True)
class Ceilings:
    """Of one device. A copy counts the bytes read and those written. Peaks by name of the data type."""

    device: str
    read_bytes_per_s: float
    copy_bytes_per_s: float
    matmul_flops_per_s: Mapping[str, float]

    def roof(self, dtype: str) -> Roof:
        """The roofline for a data type, for example "float32".

        Raises:
            ValueError: that type was not measured.
        """
        if dtype not in self.matmul_flops_per_s:
            raise ValueError(f"no peak for {dtype!r}; measured: {', '.join(self.matmul_flops_per_s)}")
        return Roof(self.read_bytes_per_s, self.matmul_flops_per_s[dtype], self.device)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Ceilings:
        """What `record_of` made; see `data/recorded`.

        Raises:
            ValueError: another schema.
        """
        if record.get("schema") != SCHEMA:
            raise ValueError(
                f"schema is {record.get('schema')!r}, not {SCHEMA!r}: measure the ceilings again"
            )
        return cls(**record["ceilings"])


def measure_ceilings(
    device: torch.device | str = "cpu", dtypes: Sequence[str] = ("float32",), rounds: int = 10
) -> Ceilings:
    """Measure a device. On two CPU cores it takes a second or two.

    Args:
        device: "cpu" or a CUDA device, which should do nothing else meanwhile
        dtypes: types to multiply matrices in, by torch's name
        rounds: how often each is timed

    Raises:
        ValueError: a device of another kind or that is not here, a type that torch lacks, or no rounds.
    """
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; use cpu, cuda or cuda:<number>") from None
    if device.type not in READ_BYTES:
        raise ValueError(f"device is {str(device)!r}; ceilings are measured on {' and '.join(READ_BYTES)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {str(device)!r}, but this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    if unknown := [name for name in dtypes if not isinstance(getattr(torch, name, None), torch.dtype)]:
        raise ValueError(f"torch has no data type {unknown[0]!r}; for example float32, bfloat16")
    peaks = {name: matmul_flops_per_s(device, getattr(torch, name), rounds) for name in dtypes}
    if device.type == "cuda":
        # Our own kernel: torch's sum does not reach the memory's speed.
        from nanopd_lab.bench.kernel_timer import Timer
        from nanopd_lab.bench.kernel_timer import measure_ceilings as bandwidths

        with torch.cuda.device(device):
            found = bandwidths(Timer())
        return Ceilings(
            torch.cuda.get_device_name(device), found["read_gb_s"] * 1e9, found["copy_gb_s"] * 1e9, peaks
        )
    read, copy = read_bytes_per_s(rounds=rounds), copy_bytes_per_s(rounds=rounds)
    threads = torch.get_num_threads()
    return Ceilings(f"this CPU, {threads} thread{'s' * (threads != 1)}", read, copy, peaks)


def read_bytes_per_s(nbytes: int = READ_BYTES["cpu"], rounds: int = 4) -> float:
    """Bytes a second that this machine's cores read from memory."""
    buffer = torch.ones(nbytes // 8, dtype=torch.int64)
    return nbytes / _best_seconds(buffer.sum, torch.device("cpu"), rounds)


def copy_bytes_per_s(nbytes: int = READ_BYTES["cpu"], rounds: int = 4) -> float:
    """Bytes a second, those read plus those written, of a large copy on the CPU."""
    source = torch.ones(nbytes // 8, dtype=torch.int64)
    target = torch.empty_like(source)
    return 2 * nbytes / _best_seconds(lambda: target.copy_(source), torch.device("cpu"), rounds)


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, rounds: int = 5) -> float:
    """FLOPs a second of a large square matrix product; of a smaller one where that would take long."""
    side = MATMUL_SIDE[device.type]
    if device.type == "cpu":
        side = _affordable_side(dtype, side)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device, rounds)


def _affordable_side(dtype: torch.dtype, most: int) -> int:
    """CPUs without matrix units for a type take 100 times as long in it: a minute for one large product."""
    side = most // 8
    while side < most:
        a = torch.randn(side, side).to(dtype)
        start = time.perf_counter()
        torch.mm(a, a)
        if time.perf_counter() - start > LONG_S:
            break
        side *= 2
    return side


def _best_seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """The shortest of `rounds` runs after a warm-up; by events on a GPU, where the host runs ahead."""
    run()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record(torch.cuda.current_stream(device))
            run()
            ended.record(torch.cuda.current_stream(device))
            ended.synchronize()
            times.append(begun.elapsed_time(ended) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return min(times)


def record_of(ceilings: Ceilings) -> dict[str, Any]:
    """A JSON-ready record with its provenance; `Ceilings.from_record` reads it."""
    return {"schema": SCHEMA, "provenance": provenance(), "ceilings": vars(ceilings)}


def format_ceilings(ceilings: Ceilings) -> str:
    """For people."""
    lines = [
        f"{ceilings.device}: read {ceilings.read_bytes_per_s / 1e9:,.1f} GB/s, "
        f"copy {ceilings.copy_bytes_per_s / 1e9:,.1f} GB/s (read + write)"
    ]
    for name, peak in ceilings.matmul_flops_per_s.items():
        ridge = ceilings.roof(name).ridge
        lines.append(f"matrix product, {name}: {peak / 1e9:,.0f} GFLOP/s, ridge at {ridge:.1f} FLOP/byte")
    return "\n".join(lines)
