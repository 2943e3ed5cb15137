"""Virtual-time driver of the controller, workers, scheduler, allocator and policies that really run. No torch."""

from nanopd_lab.router.veil import Veiled
from nanopd_lab.sim.config import SimConfig
from nanopd_lab.sim.links import LinkModel
from nanopd_lab.sim.results import RequestRecord, SimResult
from nanopd_lab.sim.simulator import Simulator
from nanopd_lab.sim.timing import ConstantTime, CostTime, LinearTime, StepTime
from nanopd_lab.sim.trace import trace_events, write_trace
from nanopd_lab.sim.workload import AZURE_LIKE, Kill, Lengths, SimRequest, poisson_arrivals

__all__ = [
    "AZURE_LIKE",
    "ConstantTime",
    "CostTime",
    "Kill",
    "Lengths",
    "LinearTime",
    "LinkModel",
    "RequestRecord",
    "SimConfig",
    "SimRequest",
    "SimResult",
    "Simulator",
    "StepTime",
    "Veiled",
    "poisson_arrivals",
    "trace_events",
    "write_trace",
]
