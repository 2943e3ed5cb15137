"""How fast a machine was, from the steps that a cluster did meanwhile: what they took, by what a cost model says.

    pace_of(cluster.steps(), model.seconds)     # 1.25: a quarter slower than the model

The work is the same on both sides, so that no request but those under way is needed to measure by. A step takes from
its begin to its end, and what its worker waited before it does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cost.company import Company
from nanopd_lab.cost.roofline import ChunkShape

Span = tuple[float, float, bool]
"""A step's begin and end, s, and whether it has no prompt tokens."""


def pace_of(
    steps: Mapping[str, Sequence[StepRecord]],
    seconds: Callable[[Sequence[ChunkShape]], float],
    company: Company | None = None,
) -> float:
    """Seconds that the steps took, by those that the model says of the same steps.

    Args:
        steps: of every worker, from where their requests began, as `Cluster.steps` returns them
        seconds: of a step with such chunks, by the model
        company: the model is of workers that all do the same, and a step counts as what it would have taken then

    Raises:
        ValueError: no step, or steps that take no time by the model.
    """
    ordered = sorted((step for each in steps.values() for step in each), key=lambda step: step.end)
    if not ordered:
        raise ValueError("the workers recorded no step; a pace takes one at least")
    modelled_s = sum(seconds(shapes) for shapes in shapes_of(ordered))
    if not modelled_s > 0:
        raise ValueError(f"{len(ordered)} steps take {modelled_s} s by the model; there is no pace by it")
    spans = [(step.begin, step.end, all(count == 1 for _, count, _ in step.chunks)) for step in ordered]
    return _work_s(spans, company) / modelled_s


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


def _work_s(spans: Sequence[Span], company: Company | None) -> float:
    """All of them together; where there is company, in seconds of workers that all do the same."""
    edges = [(time, opens, number) for number, span in enumerate(spans) for time, opens in _edges(span)]
    busy: set[int] = set()
    work_s = before = 0.0
    for now, opens, number in sorted(edges):
        decodes = sum(spans[each][2] for each in busy)
        for each in busy:
            own = spans[each][2]
            others = (decodes - own, len(busy) - decodes - (not own))
            work_s += (now - before) * (company.speed(own, *others) if company else 1.0)
        before = now
        if opens:
            busy.add(number)
        else:
            busy.remove(number)
    return work_s


def _edges(span: Span) -> tuple[tuple[float, bool], ...]:
    begin, end, _ = span
    return ((begin, True), (end, False)) if end > begin else ()
