"""Where a request runs: policies behind one protocol."""

from nanopd_lab.router.fleet import Fleet, least
from nanopd_lab.router.lengths import LengthForecast, LengthPredictor
from nanopd_lab.router.policy import Decision, JobView, Policy, Role, WorkerView, legal_routes
from nanopd_lab.router.static import (
    POLICIES,
    Collocated,
    Disaggregated,
    LeastLoaded,
    RoundRobin,
    create_policy,
)

__all__ = [
    "POLICIES",
    "Collocated",
    "Decision",
    "Disaggregated",
    "Fleet",
    "JobView",
    "LeastLoaded",
    "LengthForecast",
    "LengthPredictor",
    "Policy",
    "Role",
    "RoundRobin",
    "WorkerView",
    "create_policy",
    "least",
    "legal_routes",
]
