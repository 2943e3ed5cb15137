"""What an exercise is, and where to find one: `lab/exercises/<concept>.py` holds those of a concept."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from nanopd_lab.cluster.config import ClusterParts
from nanopd_lab.cost.calibrate import CostParts
from nanopd_lab.engine.config import EngineParts
from nanopd_lab.lab import exercises
from nanopd_lab.router.pair_rule import RouterParts


class UnknownExerciseError(ValueError):
    """No exercise has that name."""


@dataclass(frozen=True)
class Exercise:
    """One task: the package's own solution, how to check another one, three hints, and where it plugs in.

    name:      "<concept>.<what>", for example "engine.plan_chunks"
    notebook:  the number of the notebook that sets it, for example "05"
    reference: the package's own function or class; its signature is the exercise's
    check:     compares an implementation with what is right, raises `Counterexample` at the first
               difference, and returns how many cases it has compared
    hints:     from an idea to almost the code
    plug:      takes an engine's parts and an implementation, returns parts with it in place;
               None for an exercise that is no part of an engine
    cluster_plug: the same for a part of a cluster's workers
    cost_plug: the same for what a cost model is made with
    router_plug: the same for what a policy is made of
    """

    name: str
    notebook: str
    reference: Any
    check: Callable[[Any], int]
    hints: tuple[str, str, str]
    plug: Callable[[EngineParts, Any], EngineParts] | None = None
    cluster_plug: Callable[[ClusterParts, Any], ClusterParts] | None = None
    cost_plug: Callable[[CostParts, Any], CostParts] | None = None
    router_plug: Callable[[RouterParts, Any], RouterParts] | None = None

    @property
    def carrier(self) -> tuple[str, str] | None:
        """What hands an implementation on, and where to; None for an exercise that is no part of anything."""
        if self.cluster_plug is not None:
            return "lab.cluster_parts()", "the cluster"
        if self.cost_plug is not None:
            return "lab.cost_parts()", "the cost model"
        if self.router_plug is not None:
            return "lab.router_parts()", "the router"
        return None if self.plug is None else ("lab.parts()", "the engine")

    def __post_init__(self) -> None:
        assert self.name.count(".") == 1, f"an exercise is named <concept>.<what>, not {self.name!r}"
        assert len(self.hints) == 3, f"{self.name} has {len(self.hints)} hints, not three"


def _concepts() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(exercises.__path__))


def _of_concept(concept: str) -> tuple[Exercise, ...]:
    found: tuple[Exercise, ...] = import_module(f"{exercises.__name__}.{concept}").EXERCISES
    return found


def all_exercises() -> list[Exercise]:
    """Every exercise, in the order of the notebooks. Imports them all, some of them with torch."""
    found = [exercise for concept in _concepts() for exercise in _of_concept(concept)]
    return sorted(found, key=lambda exercise: exercise.notebook)


def find(name: str) -> Exercise:
    """The exercise of that name; imports its concept only.

    Raises:
        UnknownExerciseError: there is none; the message names the nearest.
    """
    concept = name.partition(".")[0]
    if concept in _concepts():
        for exercise in _of_concept(concept):
            if exercise.name == name:
                return exercise
    known = [exercise.name for exercise in all_exercises()]
    near = difflib.get_close_matches(name, known, n=1)
    guess = f'; did you mean "{near[0]}"?' if near else f"; there are {', '.join(known)}"
    raise UnknownExerciseError(f'no exercise is called "{name}"{guess}')
