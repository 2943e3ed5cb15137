"""When GPUs and controllers of a fleet die, at rates that were seen, or faster.

Llama 3 405B was trained for 54 days on 16,384 H100s with 419 unexpected interruptions (Grattafiori et al., The Llama 3
Herd of Models, 2024, section 3.3.4): one in 50,677 hours of a GPU. Ten thousand GPUs see one every five hours, so that
whoever wants to see some in a simulation of seconds lets them come faster, and counts by failure.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

from nanopd_lab.sim.workload import Kill

LLAMA3_GPU_HOURS = 16_384 * 54 * 24 / 419


class ControllerKill(NamedTuple):
    """The controller of a shard dies at `time` (s), and another one takes over `restart_s` later."""

    time: float
    shard: int
    restart_s: float


@dataclass(frozen=True)
class FailureRate:
    """Failures of GPUs, independent of each other (a Poisson process).

    gpu_hours: between two, of one GPU
    accelerate: so many times as often
    restart_s: until a worker is back; its KV is gone

    Raises:
        ValueError: a number that is not positive.
    """

    gpu_hours: float = LLAMA3_GPU_HOURS
    accelerate: float = 1.0
    restart_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("gpu_hours", "accelerate", "restart_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    def per_s(self, workers: int) -> float:
        """Failures a second of a fleet."""
        return workers * self.accelerate / (self.gpu_hours * 3600)

    def kills(self, workers: int, until_s: float, seed: int = 0) -> list[Kill]:
        """Of workers `w0` … of a fleet, until then."""
        rng, rate, now = random.Random(f"failures {seed}"), self.per_s(workers), 0.0
        found: list[Kill] = []
        while rate > 0 and math.isfinite(rate):
            now += rng.expovariate(rate)
            if now >= until_s:
                break
            found.append(Kill(now, f"w{rng.randrange(workers)}", self.restart_s))
        return found
