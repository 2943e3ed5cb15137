"""Routing in hindsight: the best routes that can be found when all arrivals and output lengths are known.

`enumerate_routes` is exact on tiny instances, `search_routes` finds good plans of larger ones, and `upper_bound` says
what no routing can exceed, so that the oracle's value is known to lie between the two.
"""

from nanopd_lab.sim.oracle.bound import Bound, upper_bound
from nanopd_lab.sim.oracle.exact import enumerate_routes
from nanopd_lab.sim.oracle.floors import Floor, floors_of
from nanopd_lab.sim.oracle.instance import Instance, Outcome, Plan, Planned, Score
from nanopd_lab.sim.oracle.search import Found, search_routes
from nanopd_lab.sim.oracle.triage import triage

__all__ = [
    "Bound",
    "Floor",
    "Found",
    "Instance",
    "Outcome",
    "Plan",
    "Planned",
    "Score",
    "enumerate_routes",
    "floors_of",
    "search_routes",
    "triage",
    "upper_bound",
]
