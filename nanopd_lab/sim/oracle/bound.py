"""How many requests can meet their objectives at most, whatever the routes. Proven, not searched.

Take a floor of the step times (see `floors`): a step of T seconds satisfies `T ≥ base + Σ u_i` over its chunks, where
u_i is what chunk i adds. Share the step's T seconds out in proportion to u_i. Chunk i gets at least
`u_i·T/(T - base) = u_i·(1 + base/(T - base))`, and all shares of a worker's steps add up to the time it is busy.

*What a request needs.* A request that meets its objectives has m = output - 1 decode steps, one after the other, in A =
min(m·TPOT, E2E - its shortest prefill) seconds. Its shares there are `Σ u_j + Σ u_j·base/(T_j - base)` with Σ T_j ≤ A,
by Cauchy-Schwarz at least

    W_decode = Σ u_j + base·(Σ √u_j)² / (A - m·base)

so that a tight TPOT, which keeps batches small, makes a token dear. Its prompt needs in the same way W_prefill = U +
base·U / (A' - k·base), with k the fewest chunks, U what they add (the fewest chunks add least), and A' = min(TTFT,
E2E - its shortest decode). Where m·base + Σ u_j > A, or k·base + U > A', no routing can meet it.

*What there is.* All of it happens on n workers, the prefill in [arrival, arrival + A'], the decode in [arrival +
shortest prefill, arrival + min(TTFT + m·TPOT, E2E)]. Time is cut into slots, windows are widened to whole slots, and
requests may be split: the number that are met is at most the value of the linear program that fills the slots. For
any prices λ_t ≥ 0 of a second in slot t, by weak duality, it is at most

    n·Σ_t λ_t·length_t + Σ_r max(0, 1 - what r's W_prefill and W_decode cost in the cheapest slots of their windows)

where a request can use no more of a slot than one worker has. The program is solved for good prices; what is returned
is this formula, which holds whatever the solver did. Queues for memory, links, whole steps and the order of arrival are
left out, so the bound errs upwards only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanopd_lab.sim.oracle.floors import Floor, floors_of
from nanopd_lab.sim.oracle.instance import Instance
from nanopd_lab.sim.workload import SimRequest

MOST_SLOTS = 160


class Bound(NamedTuple):
    """met: no routing meets more requests; possible: those that could be met if each had the cluster for itself."""

    met: int
    possible: int


class _Part(NamedTuple):
    """Work of a request (seconds of a worker) that is to be done in `[begin, end]`."""

    seconds: float
    begin: float
    end: float


def upper_bound(instance: Instance, known: int = 0) -> Bound:
    """See the module.

    Args:
        known: requests that some routing meets; a bound is not lower, and no better one is looked for at that

    Raises:
        ValueError: see `floors_of`.
    """
    floors = floors_of(instance.time)
    shortest = [_shortest(request, instance, floors) for request in instance.requests]
    possible = [number for number, times in enumerate(shortest) if times is not None]
    best = len(possible)
    for floor in floors[1::2] or floors:  # a linear program each
        if best <= known:
            break
        parts = [
            _parts(instance.requests[number], instance, floor, *times)
            for number in possible
            if (times := shortest[number]) is not None
        ]
        value = _most(parts, instance.num_workers)
        best = min(best, math.floor(value + 1e-6))
    return Bound(best, len(possible))


def work_of(instance: Instance) -> list[float]:
    """Seconds of a worker that each request needs at least to be met, by the floor that asks for most; infinite for
    those that cannot be.

    Raises:
        ValueError: see `floors_of`.
    """
    floors, found = floors_of(instance.time), []
    for request in instance.requests:
        times = _shortest(request, instance, floors)
        if times is None:
            found.append(math.inf)
            continue
        each = [_parts(request, instance, floor, *times) for floor in floors]
        found.append(max(sum(part.seconds for part in parts) for parts in each))
    return found


# ---- one request ------------------------------------------------------------------------------------


def _prefill(request: SimRequest, budget: int, floor: Floor) -> tuple[int, float]:
    """(fewest chunks, what they add to steps): their ends lie as early as they can."""
    prompt = request.prompt_tokens
    chunks = -(-prompt // budget)
    contexts = chunks * prompt - budget * (chunks * (chunks - 1) // 2)
    adds = floor.token_s * prompt + floor.pair_s * prompt * prompt / 2
    return chunks, adds + floor.context_s * contexts + floor.sequence_s * chunks


def _decode(request: SimRequest, floor: Floor) -> tuple[int, NDArray[np.float64]]:
    """(decode steps, what the request adds to each)."""
    steps = request.output_tokens - 1
    first = floor.chunk_s(request.prompt_tokens, 1)
    return steps, first + (floor.pair_s + floor.context_s) * np.arange(steps, dtype=np.float64)


def _shortest(
    request: SimRequest, instance: Instance, floors: tuple[Floor, ...]
) -> tuple[float, float] | None:
    """Seconds that its prefill and its decode take at least; None if it cannot meet its objectives."""
    slo, prefill_s, decode_s = instance.slo, 0.0, 0.0
    for floor in floors:
        chunks, adds = _prefill(request, instance.config.max_num_batched_tokens, floor)
        steps, each = _decode(request, floor)
        prefill_s = max(prefill_s, chunks * floor.base_s + adds)
        decode_s = max(decode_s, steps * floor.base_s + float(each.sum()))
    allowed = (request.output_tokens - 1) * slo.tpot_s if request.output_tokens > 1 else 0.0
    if prefill_s > slo.ttft_s or decode_s > allowed or prefill_s + decode_s > slo.e2e_s:
        return None
    return prefill_s, decode_s


def _parts(
    request: SimRequest, instance: Instance, floor: Floor, prefill_s: float, decode_s: float
) -> tuple[_Part, ...]:
    """What it needs of workers, and when, if it is to meet its objectives."""
    slo, arrival = instance.slo, request.arrival
    chunks, adds = _prefill(request, instance.config.max_num_batched_tokens, floor)
    steps, each = _decode(request, floor)
    within = min(slo.ttft_s, slo.e2e_s - decode_s)
    parts = [_Part(adds + _base_share(floor.base_s, adds, within - chunks * floor.base_s), arrival, within)]
    if steps:
        allowed = min(steps * slo.tpot_s, slo.e2e_s - prefill_s)
        roots = float(np.sqrt(each).sum()) ** 2
        seconds = float(each.sum()) + _base_share(floor.base_s, roots, allowed - steps * floor.base_s)
        end = min(slo.ttft_s + steps * slo.tpot_s, slo.e2e_s)
        parts.append(_Part(seconds, arrival + prefill_s, end))
    return tuple(part._replace(end=arrival + part.end) for part in parts)


def _base_share(base_s: float, adds: float, room: float) -> float:
    """`base·adds/room`; without a limit on time steps may be as long as they like, and the base costs nobody much."""
    return base_s * adds / room if 0 < room < math.inf else 0.0


# ---- all of them ------------------------------------------------------------------------------------


def _most(parts: list[tuple[_Part, ...]], num_workers: int) -> float:
    """The bound from capacity, over prices that the linear program finds."""
    if not parts:
        return 0.0
    edges = _slots([part for each in parts for part in each])
    lengths = np.diff(edges)
    windows = [
        [
            (
                part.seconds,
                max(0, int(np.searchsorted(edges, part.begin, "right")) - 1),
                min(len(lengths), int(np.searchsorted(edges, part.end, "left"))),
            )
            for part in each
            if part.end < math.inf
        ]
        for each in parts
    ]
    prices = _prices(windows, lengths, num_workers)
    total = num_workers * float(prices @ lengths)
    for each in windows:
        total += max(0.0, 1.0 - sum(_cheapest(prices[a:b], lengths[a:b], w) for w, a, b in each))
    return total


def _slots(parts: list[_Part]) -> NDArray[np.float64]:
    """Edges of slots: ends of windows, thinned out."""
    edges = sorted({t for part in parts for t in (part.begin, part.end) if t < math.inf})
    if len(edges) > MOST_SLOTS + 1:
        places = np.linspace(0, len(edges) - 1, MOST_SLOTS + 1).round().astype(int)
        edges = [edges[place] for place in places]
    return np.array(edges)


def _cheapest(prices: NDArray[np.float64], lengths: NDArray[np.float64], seconds: float) -> float:
    """What `seconds` of a worker cost in the cheapest of these slots, no more of each than it is long."""
    order = np.argsort(prices)
    taken = np.minimum(lengths[order], np.maximum(0.0, seconds - np.cumsum(lengths[order]) + lengths[order]))
    return float(prices[order] @ taken)


def _prices(
    windows: list[list[tuple[float, int, int]]], lengths: NDArray[np.float64], num_workers: int
) -> NDArray[np.float64]:
    """Of a second in each slot: the duals of the linear program, whose variables are the shares of requests that are
    met and the seconds that each of their parts gets in each slot."""
    from scipy.optimize import linprog
    from scipy.sparse import coo_matrix

    wants: list[tuple[int, int, float]] = []  # row (a part), column, coefficient
    fills: list[tuple[int, int, float]] = []  # row (a slot), column, coefficient
    column, row = len(windows), 0
    for number, each in enumerate(windows):
        for seconds, begin, end in each:
            wants.append((row, number, -seconds))
            for slot in range(begin, end):
                wants.append((row, column, 1.0))
                fills.append((slot, column, 1.0))
                column += 1
            row += 1
    if not fills:
        return np.zeros(len(lengths))

    def matrix(entries: list[tuple[int, int, float]], rows: int) -> coo_matrix:
        places, columns, values = zip(*entries, strict=True)
        return coo_matrix((values, (places, columns)), shape=(rows, column))

    solved = linprog(
        np.r_[-np.ones(len(windows)), np.zeros(column - len(windows))],
        A_ub=matrix(fills, len(lengths)).tocsr(),
        b_ub=num_workers * lengths,
        A_eq=matrix(wants, row).tocsr(),
        b_eq=np.zeros(row),
        bounds=np.c_[np.zeros(column), np.r_[np.ones(len(windows)), np.full(column - len(windows), np.inf)]],
        method="highs",
    )
    if solved.ineqlin is None or solved.status != 0:
        return np.zeros(len(lengths))  # a bound still, from the requests one by one
    return np.maximum(0.0, -np.asarray(solved.ineqlin.marginals, dtype=np.float64))
