"""The grid: what is served (mix), when it comes (shape), what is promised (SLO), over which links, how much of it."""

from __future__ import annotations

import bisect
import itertools
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.roofline import ChunkShape
from nanopd_lab.sim.workload import AZURE_LIKE, Lengths, SimRequest

TRACE = "trace"  # the mix that is read from a file
MOST_PROMPT, MOST_OUTPUT = 8000, 2000  # tokens

MIXES: dict[str, tuple[Lengths, Lengths]] = {
    "chat": AZURE_LIKE,
    "prefill-heavy": (Lengths(2000.0, 0.7, 8000), Lengths(30.0, 0.8, 400)),
    "decode-heavy": (Lengths(250.0, 0.8, 2000), Lengths(400.0, 0.7, 2000)),
}
"""Prompts and outputs. Two names with `>` between are a mix that shifts: the first half of the time the one, then the
other, at rates at which a request's work comes evenly."""

SHAPES: dict[str, tuple[float, ...]] = {
    "steady": (1.0,),
    "ramp": tuple(0.4 + 1.2 * (1 - abs(part - 9.5) / 10) / 1.0 for part in range(20)),
    "bursts": (0.5, 0.5, 0.5, 2.5) * 3,
}
"""Rates in equal parts of the time, relative to the mean: Poisson arrivals within each."""


class Cell(NamedTuple):
    """One cell of the grid.

    slo:      as of `--goodput`, such as "ttft:500 tpot:12"
    link_gbs: bandwidth of a worker's card, GB/s; None: the cost model's
    load:     arrival rate by the knee (see `knee`)
    machine:  a cost model or a device of `data/hardware`; "": that of the settings
    workers:  0: as many as the settings have
    """

    mix: str
    shape: str
    slo: str
    link_gbs: float | None
    load: float
    machine: str = ""
    workers: int = 0

    @property
    def group(self) -> str:
        """What cells share that differ in load only: they have one knee."""
        link = "own link" if self.link_gbs is None else f"{self.link_gbs:g} GB/s"
        where = f", {self.workers} x {self.machine}" if self.machine else ""
        return f"{self.mix}, {self.shape}, {self.slo}, {link}{where}"

    def __str__(self) -> str:
        return f"{self.group}, {self.load:g}"


def lengths_of(name: str) -> tuple[Lengths, Lengths]:
    """(prompts, outputs) of one of MIXES, or of medians and sigmas: `1000~0.9:130~1.0`.

    Raises:
        ValueError: neither.
    """
    if name in MIXES:
        return MIXES[name]
    number = r"(\d+)~(\d+(?:\.\d+)?)"
    found = re.fullmatch(f"{number}:{number}", name)
    if found is None:
        raise ValueError(
            f"unknown mix {name!r}; choose {', '.join(MIXES)}, medians and sigmas as 1000~0.9:130~1.0, two of them "
            "with > between, or trace"
        )
    prompt, spread, output, width = (float(each) for each in found.groups())
    return Lengths(prompt, spread, MOST_PROMPT), Lengths(output, width, MOST_OUTPUT)


def requests_of(
    cell: Cell, rate: float, count: int, seed: int, model: IterationModel, trace: Sequence[SimRequest] = ()
) -> list[SimRequest]:
    """`count` requests of a cell, `rate` a second on average.

    Args:
        model: says how much work a request of each part of a shifting mix is
        trace: what the mix `trace` takes its pieces from: each seed another one, at its own bursts

    Raises:
        ValueError: an unknown mix or shape, no trace, or one with fewer requests.
    """
    if cell.shape not in SHAPES:
        raise ValueError(f"unknown shape {cell.shape!r}; choose one of {', '.join(SHAPES)}")
    if cell.mix == TRACE:
        return _piece(trace, rate, count, seed)
    phases = [lengths_of(name) for name in cell.mix.split(">")]
    rng = random.Random(seed)
    speeds = [1.0 / work_s(model, *lengths) for lengths in phases]
    parts = len(SHAPES[cell.shape]) * len(phases)
    rates = [
        SHAPES[cell.shape][part // len(phases)] * speeds[part * len(phases) // parts] for part in range(parts)
    ]
    mean = sum(rates) / parts
    span = count / rate  # seconds, about
    edges = [span * part / parts for part in range(parts + 1)]
    area = [
        0.0,
        *itertools.accumulate(count * each / mean / parts for each in rates),
    ]  # requests until each edge
    found, turn = [], 0.0
    for number in range(count):
        turn += rng.expovariate(1.0)
        part = min(bisect.bisect_right(area, turn) - 1, parts - 1)
        now = edges[part] + (turn - area[part]) / (area[part + 1] - area[part]) * (span / parts)
        prompt, output = phases[min(part * len(phases) // parts, len(phases) - 1)]
        found.append(SimRequest(f"r{number}", now, prompt.draw(rng), output.draw(rng)))
    return found


def _piece(trace: Sequence[SimRequest], rate: float, count: int, seed: int) -> list[SimRequest]:
    """The `seed`-th piece of a trace, its time stretched to the rate."""
    if len(trace) < count:
        raise ValueError(
            f"the mix 'trace' takes {count} requests and the trace has {len(trace)}; name a longer one (--trace), or "
            "lower --num-prompts"
        )
    first = seed * count % (len(trace) - count + 1)
    piece = trace[first : first + count]
    begin = piece[0].arrival
    stretch = count / rate / max(piece[-1].arrival - begin, 1e-9)
    return [
        SimRequest(f"r{number}", (each.arrival - begin) * stretch, each.prompt_tokens, each.output_tokens)
        for number, each in enumerate(piece)
    ]


def work_s(model: IterationModel, prompt: Lengths, output: Lengths) -> float:
    """About what a median request costs a worker: its prefill, and its share of decode steps of 32."""
    tokens, steps = round(prompt.median), round(output.median)
    batch = 32
    decode = model.decode_seconds(batch, batch * (tokens + steps // 2)) / batch
    return model.seconds([ChunkShape(tokens)]) + steps * decode
