"""What a simulated worker holds, and what is between the workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanopd_lab.cluster.actions import Limits
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.cost.company import Company
from nanopd_lab.sim.links import LinkModel


@dataclass(frozen=True)
class SimConfig:
    """The workers, all alike, and what is between them; names as in `EngineConfig`.

    enable_prefix_caching: off, it costs a hash a block; `SimRequest.prefix` needs it
    block_bytes: of KV a block, for pulls
    message_s: what a message between controller and worker takes
    beat_s: between a worker's reports to the controller; None: policies don't see free blocks
    ahead: workers plan a step while the one before it runs, as engines on GPUs do
    company: workers are on one host, and steps are faster while others rest; None: each has a device of its own
    skip: jump over runs of equal decode steps
    trace: keep what every worker did

    Raises:
        ValueError: a setting is out of range.
    """

    num_blocks: int = 2048
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 16384
    enable_prefix_caching: bool = False
    block_bytes: int = 0
    link: LinkModel = field(default_factory=LinkModel)
    terms: LeaseTerms = field(default_factory=LeaseTerms)
    limits: Limits = field(default_factory=lambda: Limits(heartbeat_s=float("inf")))
    message_s: float = 0.0
    beat_s: float | None = None
    ahead: bool = False
    company: Company | None = None
    skip: bool = True
    trace: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.block_bytes < 0:
            raise ValueError(f"block_bytes is {self.block_bytes}; it must not be negative")
        if self.beat_s is not None and not 0 < self.beat_s < float("inf"):
            raise ValueError(f"beat_s is {self.beat_s}; it must be positive and finite, or None")

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output, that a worker takes."""
        return min(self.max_model_len, self.num_blocks * self.block_size)
