"""The lab: exercises that are checked against the package and then plugged into the real engine.

    from nanopd_lab import LLM, lab

    @lab.exercise("engine.plan_chunks")
    def plan_chunks(num_decodes, prefills, budget):
        raise NotImplementedError("your turn")

    lab.check("engine.plan_chunks")           # PASS, TODO, or FAIL with the first counterexample
    lab.hint("engine.plan_chunks", 1)         # three levels
    lab.solution("engine.plan_chunks")        # the package's own source
    llm = LLM("smollm2", parts=lab.parts())   # the engine with every part that passed its check

The package is the reference solution. An exercise (`registry.Exercise`) names a function or class of the
package, says how to check an implementation of it, and where in `EngineParts` it goes; it lives with its
concept in `lab/exercises/`. `NANOPD_LAB_MODE=reference` runs everything with the package's own code.
"""

from __future__ import annotations

from nanopd_lab.lab import cuda
from nanopd_lab.lab.checking import Counterexample
from nanopd_lab.lab.registry import Exercise, UnknownExerciseError, all_exercises, find
from nanopd_lab.lab.report import CheckFailedError, Report, Status
from nanopd_lab.lab.session import Session
from nanopd_lab.lab.signature import SignatureError
from nanopd_lab.lab.text import show

_session = Session()

exercise = _session.exercise
check = _session.check
examine = _session.examine
hint = _session.hint
solution = _session.solution
use = _session.use
parts = _session.parts
cluster_parts = _session.cluster_parts
cost_parts = _session.cost_parts
router_parts = _session.router_parts
progress = _session.progress
record = _session.record
ledger = _session.ledger
save = _session.save
load = _session.load

__all__ = [
    "CheckFailedError",
    "Counterexample",
    "Exercise",
    "Report",
    "Session",
    "SignatureError",
    "Status",
    "UnknownExerciseError",
    "all_exercises",
    "check",
    "cluster_parts",
    "cost_parts",
    "cuda",
    "examine",
    "exercise",
    "find",
    "hint",
    "ledger",
    "load",
    "parts",
    "progress",
    "record",
    "router_parts",
    "save",
    "show",
    "solution",
    "use",
]
