"""Where a request runs: policies behind one protocol."""

from nanopd_lab.router.fleet import Fleet, least
from nanopd_lab.router.lengths import LengthForecast, LengthPredictor
from nanopd_lab.router.outlook import Outlook
from nanopd_lab.router.policy import Decision, JobView, Policy, Role, WorkerView, legal_routes
from nanopd_lab.router.slo import Slo
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
    "Outlook",
    "Policy",
    "Role",
    "RoundRobin",
    "Slo",
    "WorkerView",
    "create_policy",
    "least",
    "legal_routes",
]
