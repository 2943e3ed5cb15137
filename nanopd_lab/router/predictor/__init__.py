"""Output lengths learnt from requests that end: a hierarchical Bayesian model, and baselines."""

from nanopd_lab.router.predictor.baselines import BucketedMean, BucketedQuantiles, OverallQuantiles
from nanopd_lab.router.predictor.bayesian import BayesianLengths
from nanopd_lab.router.predictor.parent import Prior

__all__ = ["BayesianLengths", "BucketedMean", "BucketedQuantiles", "OverallQuantiles", "Prior"]
