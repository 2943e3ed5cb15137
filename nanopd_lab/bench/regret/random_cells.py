"""Cells that nobody chose: machines, links, lengths, objectives, shapes and loads drawn at random from a seed.

Objectives are multiples of what a request takes alone on its machine, so that they are neither out of reach nor none.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from nanopd_lab.bench.regret.cells import SHAPES, Cell, lengths_of
from nanopd_lab.bench.regret.grid import Bench
from nanopd_lab.bench.regret.knee import planned_knee
from nanopd_lab.cost.roofline import ChunkShape

WORKERS = (2, 3, 4, 6, 8)
PROMPTS, OUTPUTS, SPREADS = (128.0, 4000.0), (16.0, 500.0), (0.3, 1.1)  # medians (tokens), sigmas
TTFT, TPOT = (2.0, 15.0), (1.15, 4.0)  # times the longer prompts' and a lone decode step's
LOADS, LINKS = (0.6, 1.3), (2.0, 50.0)  # of the knee; GB/s
VARYING, OTHER_LINK, SHIFTING = 0.5, 0.4, 0.5  # shares of cells; of varying ones, those whose mix shifts


def random_cells(bench: Bench, count: int, seed: int, machines: Sequence[str]) -> list[Cell]:
    """`count` cells in which some layout can serve at all, by formula.

    Raises:
        ValueError: an unknown machine.
    """
    rng = random.Random(f"cells {seed}")
    found: list[Cell] = []
    while len(found) < count:
        cell = _draw(bench, rng, machines)
        if planned_knee(bench, cell) > 0:
            found.append(cell)
    return found


def _draw(bench: Bench, rng: random.Random, machines: Sequence[str]) -> Cell:
    phases, shape = [_mix(rng)], "steady"
    if rng.random() < VARYING:
        if rng.random() < SHIFTING:
            phases.append(_mix(rng))
        else:
            shape = rng.choice([name for name in SHAPES if name != "steady"])
    link = round(_between(rng, *LINKS), 1) if rng.random() < OTHER_LINK else None
    load = round(rng.uniform(*LOADS), 2)
    cell = Cell(">".join(phases), shape, "", link, load, rng.choice(machines), rng.choice(WORKERS))
    model = bench.cost_of(cell).iteration
    longest = max(prompt.median * math.exp(prompt.sigma) for prompt, _ in map(lengths_of, phases))
    alone_s = model.seconds([ChunkShape(round(longest))])
    objectives = _between(rng, *TTFT) * alone_s, _between(rng, *TPOT) * model.decode_seconds(1, 1)
    ttft, tpot = (f"{float(f'{1e3 * each:.2g}'):g}" for each in objectives)
    return cell._replace(slo=f"ttft:{ttft} tpot:{tpot}")


def _mix(rng: random.Random) -> str:
    parts = [f"{_between(rng, *medians):.0f}~{rng.uniform(*SPREADS):.1f}" for medians in (PROMPTS, OUTPUTS)]
    return ":".join(parts)


def _between(rng: random.Random, low: float, high: float) -> float:
    """Evenly on a logarithmic scale."""
    return low * (high / low) ** rng.random()
