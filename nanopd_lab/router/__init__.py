"""Where a request runs: policies behind one protocol."""

from nanopd_lab.router.adaptive import Adaptive
from nanopd_lab.router.explanation import Candidate, Explanation
from nanopd_lab.router.fleet import Fleet, least
from nanopd_lab.router.lengths import LengthForecast, LengthPredictor
from nanopd_lab.router.nanopd_rule import NanoPDRule
from nanopd_lab.router.outlook import Outlook
from nanopd_lab.router.policy import Decision, JobView, Policy, Postponed, Role, WorkerView, legal_routes
from nanopd_lab.router.registry import ESTIMATING, POLICIES, create_policy, needs_outlook
from nanopd_lab.router.slo import Slo
from nanopd_lab.router.static import Collocated, Disaggregated, LeastLoaded, RoundRobin
from nanopd_lab.router.threshold import Threshold
from nanopd_lab.router.veil import Veiled

__all__ = [
    "ESTIMATING",
    "POLICIES",
    "Adaptive",
    "Candidate",
    "Collocated",
    "Decision",
    "Disaggregated",
    "Explanation",
    "Fleet",
    "JobView",
    "LeastLoaded",
    "LengthForecast",
    "LengthPredictor",
    "NanoPDRule",
    "Outlook",
    "Policy",
    "Postponed",
    "Role",
    "RoundRobin",
    "Slo",
    "Threshold",
    "Veiled",
    "WorkerView",
    "create_policy",
    "least",
    "legal_routes",
    "needs_outlook",
]
