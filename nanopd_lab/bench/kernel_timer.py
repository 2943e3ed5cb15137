"""Times launches on a GPU: interleaved, each with a cold L2 cache, the median of the rounds.

Everything that is compared runs interleaved in one process; before each timed launch the L2 cache is filled with other,
clean data; the time is between two device events around the launch, enqueued while the GPU is still busy with that
flush, so that host time doesn't show.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nanopd_lab.kernels import gpu
from nanopd_lab.kernels.launches import Launch

FLUSH_BYTES = 1 << 30  # long enough that a slow host is ahead of the GPU


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
