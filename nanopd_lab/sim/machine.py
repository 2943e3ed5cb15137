"""What is simulated, as commands and plans name it: a GPU with a model on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanopd_lab.cost.iteration import IterationModel
    from nanopd_lab.router import Outlook, Slo
    from nanopd_lab.sim.config import SimConfig
    from nanopd_lab.sim.timing import StepTime


@dataclass(frozen=True)
class Machine:
    """What is simulated: how long steps take, and what a worker holds."""

    name: str
    model: str
    time: StepTime
    config: SimConfig
    iteration: IterationModel

    def outlook(self, slo: Slo | None = None) -> Outlook:
        """What policies that estimate are told of it."""
        from nanopd_lab.router import Outlook, Slo

        return Outlook(
            self.iteration,
            slo or Slo(),
            self.config.link,
            self.config.block_bytes,
            self.config.block_size,
            self.config.max_num_batched_tokens,
            self.config.ahead,
        )
