"""Routing in hindsight: the best routes that can be found when all arrivals and output lengths are known.

`enumerate_routes` is exact on tiny instances, `best_routes` finds good plans of larger ones (from policies, triage and
local search), and `upper_bound` says what no routing can exceed, so that the best value lies between the two.
"""

from nanopd_lab.sim.oracle.bound import Bound, upper_bound
from nanopd_lab.sim.oracle.exact import enumerate_routes
from nanopd_lab.sim.oracle.floors import Floor, floors_of
from nanopd_lab.sim.oracle.hindsight import best_routes, is_static, oracle, statics
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
    "best_routes",
    "enumerate_routes",
    "floors_of",
    "is_static",
    "oracle",
    "search_routes",
    "statics",
    "triage",
    "upper_bound",
]
