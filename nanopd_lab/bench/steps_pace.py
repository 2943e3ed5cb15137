"""How fast a machine was, from the steps that a cluster did meanwhile: what they took, by what a cost model says.

    pace_of(works_of(cluster.steps()), model)     # Pace(reading=1.25, computing=1.0): memory a quarter slower than that

The work is the same on both sides, so that no request but those under way is needed to measure by. A step takes from
its begin to its end, and what its worker waited before it does not count. A machine that others use too has two speeds
that change by the minute and not together: decode steps wait for memory, prompts compute.

Not where steps are launched ahead, as on GPUs: the host sees the end of a step once it has launched the next one, so
that before a prompt, whose launch takes long, a decode step seems slow and the prompt fast. (Two H100s, 8B parameters,
corrected so: "what computes takes 0.78 times as long" collocated and 1.05 with 1p1d.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cost.company import Company
from nanopd_lab.cost.files import CostModel
from nanopd_lab.cost.iteration import COEFFICIENTS, IterationModel
from nanopd_lab.cost.roofline import ChunkShape

COMPUTING = ("token_s", "pair_s", "short_pair_s", "mixed_s", "rows_s")
"""Coefficients of what computes; the others are of what reads."""
CORRECTIONS = 60  # each leaves a part of what was missing

Span = tuple[float, float, bool]
"""A step's begin and end, s, and whether it has no prompt tokens."""


class Work(NamedTuple):
    """A step's chunks, what it took (s), and whether it has no prompt tokens."""

    chunks: Sequence[ChunkShape]
    seconds: float
    decodes_only: bool


class Pace(NamedTuple):
    """How many times as long as a model says that takes which a step reads, and that which it computes."""

    reading: float = 1.0
    computing: float = 1.0

    def of(self, model: IterationModel) -> IterationModel:
        """Of a machine at this pace."""
        seconds = {
            name: (self.computing if name in COMPUTING else self.reading) * getattr(model, name)
            for name in COEFFICIENTS
            if name.endswith("_s")
        }
        return replace(model, **seconds)


def shows_pace(cost: CostModel) -> bool:
    """False if the model is of steps that are launched ahead."""
    return not cost.fit.get("ahead", False)


def pace_of(works: Sequence[Work], model: IterationModel) -> Pace:
    """At which decode steps take as long by the model, all together, as they did, and steps with prompts too.

    Where all are of one kind both paces are the same.

    Raises:
        ValueError: no step, or steps that take no time by the model.
    """
    if not works:
        raise ValueError("the workers recorded no step; a pace takes one at least")
    kinds = [[each for each in works if each.decodes_only is only] for only in (True, False)]
    if not all(kinds):
        kinds = [list(works)] * 2
    taken = [sum(each.seconds for each in kind) for kind in kinds]
    pace = Pace()
    for _ in range(CORRECTIONS):
        at_pace = pace.of(model)
        modelled = [sum(at_pace.seconds(each.chunks) for each in kind) for kind in kinds]
        if not min(modelled) > 0:
            raise ValueError(
                f"{len(works)} steps take {sum(modelled)} s by the model; there is no pace by it"
            )
        pace = Pace(*(old * a / b for old, a, b in zip(pace, taken, modelled, strict=True)))
    return pace


def works_of(steps: Mapping[str, Sequence[StepRecord]], company: Company | None = None) -> list[Work]:
    """All steps of all workers, by their end.

    Args:
        steps: of every worker, from where their requests began, as `Cluster.steps` returns them
        company: a step counts as what it would have taken with all workers in steps of its kind, as the model's do
    """
    ordered = sorted((step for each in steps.values() for step in each), key=lambda step: step.end)
    spans = [(step.begin, step.end, all(count == 1 for _, count, _ in step.chunks)) for step in ordered]
    return [
        Work(shapes, seconds, decodes_only)
        for shapes, seconds, (_, _, decodes_only) in zip(
            shapes_of(ordered), _work_s(spans, company), spans, strict=True
        )
    ]


def shapes_of(steps: Sequence[StepRecord]) -> list[list[ChunkShape]]:
    """The chunks of each step, with what was computed of their tries before.

    A try keeps its key when another worker goes on with it, and a new try has a new one. One that was preempted, which
    shows in a prompt behind a decode step, begins again.

    Args:
        steps: of all workers, by their end
    """
    # From the last step on, as a prompt's chunk is the last one if a decode step follows, or nothing does.
    decodes_next: dict[str, bool] = {}
    samples: list[list[bool]] = []
    for step in reversed(steps):
        samples.append([decode or decodes_next.get(key, True) for key, _, decode in step.chunks])
        decodes_next |= {key: decode for key, _, decode in step.chunks}
    samples.reverse()
    computed: dict[str, int] = {}
    decoded: set[str] = set()
    found = []
    for step, drawn in zip(steps, samples, strict=True):
        shapes = []
        for (key, count, decode), draws in zip(step.chunks, drawn, strict=True):
            if decode:
                decoded.add(key)
            elif key in decoded:
                decoded.remove(key)
                computed[key] = 0
            past = computed.get(key, 0)
            shapes.append(ChunkShape(count, past, int(draws)))
            computed[key] = past + count
        found.append(shapes)
    return found


def _work_s(spans: Sequence[Span], company: Company | None) -> list[float]:
    """Of each; where there is company, in seconds of workers that all do the same."""
    edges = [(time, opens, number) for number, span in enumerate(spans) for time, opens in _edges(span)]
    busy: set[int] = set()
    work_s, before = [0.0] * len(spans), 0.0
    for now, opens, number in sorted(edges):
        decodes = sum(spans[each][2] for each in busy)
        for each in busy:
            own = spans[each][2]
            others = (decodes - own, len(busy) - decodes - (not own))
            work_s[each] += (now - before) * (company.speed(own, *others) if company else 1.0)
        before = now
        if opens:
            busy.add(number)
        else:
            busy.remove(number)
    return work_s


def _edges(span: Span) -> tuple[tuple[float, bool], ...]:
    begin, end, _ = span
    return ((begin, True), (end, False)) if end > begin else ()
