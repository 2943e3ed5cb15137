"""How long it takes to move KV blocks from one worker to another."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass


@dataclass(frozen=True)
class TransferSample:
    """A pull that was timed."""

    blocks: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class TransferModel:
    """`setup + blocks·t_block + bytes/bandwidth` of one link, while nobody else uses it.

    Raises:
        ValueError: a time that is negative or not finite, or a bandwidth that is not positive (infinite is allowed).
    """

    setup_s: float = 0.0
    block_s: float = 0.0
    bytes_per_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("setup_s", "block_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it is finite and not negative")
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s is {self.bytes_per_s}; it must be positive")

    def seconds(self, blocks: int, nbytes: int) -> float:
        """Of one pull; 0 if there is nothing to move."""
        return self.setup_s + blocks * self.block_s + nbytes / self.bytes_per_s if blocks else 0.0

    @classmethod
    def fit(cls, samples: Seq[TransferSample]) -> TransferModel:
        """By non-negative least squares on the relative error.

        Where all blocks are of one size, time per block and per byte cannot be told apart; all of it then counts as
        per byte, and `block_s` is 0.

        Raises:
            ValueError: fewer than two samples, or one without blocks or time.
        """
        import numpy as np
        from scipy.optimize import nnls

        if len(samples) < 2 or any(s.blocks < 1 or not s.seconds > 0 for s in samples):
            raise ValueError(f"a fit needs two timed pulls or more, each of blocks; got {list(samples)[:3]}")
        # Seconds per gigabyte, so that columns are of like size.
        rows = np.array([[1.0, s.blocks, s.nbytes / 1e9] for s in samples])
        seconds = np.array([s.seconds for s in samples])
        if len({s.nbytes / s.blocks for s in samples}) == 1:
            rows[:, 1] = 0.0
        scaled = rows / seconds[:, None]
        size = np.linalg.norm(scaled, axis=0)
        size[size == 0] = 1.0
        setup, block, gigabyte = nnls(scaled / size, np.ones(len(samples)))[0] / size
        return cls(float(setup), float(block), 1e9 / float(gigabyte) if gigabyte > 0 else math.inf)
