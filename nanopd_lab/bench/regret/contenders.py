"""Policies by name as they compete: veiled, so that none sees an output's length, and with a predictor if one is named.

`adaptive:mean` is `adaptive` with nanoPD's bucketed mean, `adaptive:constant` with one length for all, and
`adaptive:truth` is told each request's length, which no server knows: the difference is what a better predictor could
gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nanopd_lab.router import LengthPredictor, Outlook, Policy, Role, create_policy
from nanopd_lab.router.predictor import BayesianLengths, BucketedMean
from nanopd_lab.router.predictor.baselines import NANOPD_DEFAULT, Empirical
from nanopd_lab.router.veil import Veiled

TRUTH = "truth"


class ToldLengths:
    """Each output is as long as its request's `max_tokens`: in a simulation that is the truth, unless it is veiled."""

    def predict(self, prompt_tokens: int, max_tokens: int) -> Empirical:
        """See `LengthPredictor`."""
        return Empirical((float(max_tokens),), max_tokens)

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        """There is nothing to learn."""


class ConstantLengths:
    """Every output is `tokens` long, whatever is observed."""

    def __init__(self, tokens: int = NANOPD_DEFAULT) -> None:
        self.tokens = float(tokens)

    def predict(self, prompt_tokens: int, max_tokens: int) -> Empirical:
        """See `LengthPredictor`."""
        return Empirical((min(self.tokens, float(max_tokens)),), max_tokens)

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        """It does not learn."""


PREDICTORS: dict[str, Callable[[], LengthPredictor]] = {
    "bayesian": BayesianLengths,
    "mean": BucketedMean,
    "constant": ConstantLengths,
    TRUTH: ToldLengths,
}


def contender(name: str, num_workers: int, outlook: Outlook) -> tuple[Policy, Sequence[Role]]:
    """`policy` or `policy:predictor`, and the workers' roles.

    Raises:
        ValueError: as of `create_policy`, or an unknown predictor.
    """
    base, _, predictor = name.partition(":")
    if predictor:
        if predictor not in PREDICTORS:
            raise ValueError(f"policy {name!r}: unknown predictor; choose one of {', '.join(PREDICTORS)}")
        outlook = replace(outlook, predictor=PREDICTORS[predictor]())
    policy, roles = create_policy(base, num_workers, outlook)
    return policy if predictor == TRUTH else Veiled(policy), roles
