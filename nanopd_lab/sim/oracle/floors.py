"""Linear lower bounds of a step's time, which let a step be shared out among those in it."""

from __future__ import annotations

from typing import NamedTuple

from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.sim.timing import ConstantTime, CostTime, LinearTime, StepTime

SHARES = (0.2, 0.4, 0.6, 0.75, 0.85, 0.95, 1.0)  # of reading the weights that a floor keeps
ROUNDING = 1e-9  # relative; far more than floats lose


class Floor(NamedTuple):
    """No step takes less than `base_s` and, for each chunk `(start, count)` in it, `chunk_s(start, count)`; seconds."""

    base_s: float
    token_s: float = 0.0
    pair_s: float = 0.0
    context_s: float = 0.0
    sequence_s: float = 0.0

    def chunk_s(self, start: int, count: int) -> float:
        """What a chunk adds to a step at least."""
        return (
            self.token_s * count
            + self.pair_s * count * (start + count / 2)
            + self.context_s * (start + count)
            + self.sequence_s
        )


def floors_of(time: StepTime) -> tuple[Floor, ...]:
    """Floors of a cost model, none of which need be the best for all steps.

    `IterationModel` takes the p-norm of w, the time to read the weights, and x, that of the products. By Hölder's
    inequality it is at least `a·w + b·x` for all a, b ≥ 0 with `a^q + b^q = 1` and `1/p + 1/q = 1`; the floors are
    those of some a. Padding, the host's time, short chunks, mixed steps and several rows only add.

    Raises:
        ValueError: a cost model of another kind.
    """
    if isinstance(time, ConstantTime):
        found = [Floor(time.step_s)]
    elif isinstance(time, LinearTime):
        found = [Floor(time.base_s, time.token_s, 0.0, time.context_s, time.sequence_s)]
    elif isinstance(time, CostTime):
        found = _tangents(time.model)
    else:
        raise ValueError(
            f"no lower bounds are known for {type(time).__name__}; use CostTime, LinearTime or ConstantTime"
        )
    return tuple(Floor(*(value * (1 - ROUNDING) for value in floor)) for floor in dict.fromkeys(found))


def _tangents(model: IterationModel) -> list[Floor]:
    found = []
    for weights in SHARES:
        products = 1.0 - weights  # of a sum, which p = 1 is
        if model.sharpness > 1:
            dual = model.sharpness / (model.sharpness - 1)
            products = (1.0 - weights**dual) ** (1.0 / dual)
        else:
            weights = products = 1.0
        found.append(
            Floor(
                model.t0_s + weights * model.weight_s * (1.0 + model.vocab_share),
                products * model.token_s,
                model.pair_s,
                model.context_s,
                model.sequence_s + products * model.token_s * model.vocab_share,
            )
        )
    return found
