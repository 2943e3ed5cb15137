"""What a policy that estimates is told before anything has run: how long things take, and what is promised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanopd_lab.router.lengths import LengthPredictor
from nanopd_lab.router.slo import Slo

if TYPE_CHECKING:
    from nanopd_lab.cost.files import CostModel
    from nanopd_lab.cost.iteration import IterationModel
    from nanopd_lab.cost.nanopd import NanoPDModel
    from nanopd_lab.cost.transfer_time import TransferModel


@dataclass(frozen=True)
class Outlook:
    """See the module; all workers are alike.

    iteration:   a step's time
    slo:         what requests are promised; without any objective a policy aims at short times
    transfer:    a pull's time over an idle link; None: it takes none
    block_bytes, block_size: of KV a block, and its tokens
    max_num_batched_tokens: a step's budget
    ahead:       workers plan a step while the one before it runs
    predictor:   of output lengths; None: the policy's own
    nanopd:      parameters of nanoPD's rule; None: derived from `iteration` and `transfer`
    """

    iteration: IterationModel
    slo: Slo = field(default_factory=Slo)
    transfer: TransferModel | None = None
    block_bytes: int = 0
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    ahead: bool = False
    predictor: LengthPredictor | None = None
    nanopd: NanoPDModel | None = None

    @classmethod
    def of(cls, cost: CostModel, slo: Slo | None = None, max_num_batched_tokens: int = 2048) -> Outlook:
        """With what a fitted cost model knows."""
        return cls(
            cost.iteration,
            slo or Slo(),
            cost.transfer,
            int(cost.fit.get("block_bytes", 0)),
            int(cost.fit.get("block_size", 16)),
            max_num_batched_tokens,
            bool(cost.fit.get("ahead", False)),
        )
