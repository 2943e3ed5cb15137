"""From timed steps to the coefficients of the iteration model.

For a given corner (how many tokens' products take as long as reading the weights, and how sharp it is) and a given
host time the model is linear in what is left, which non-negative least squares finds. The relative error is
minimised: a 5 ms step counts as much as a 500 ms one. Corner and host time are searched for around it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from nanopd_lab.cost.iteration import CapturedSizes, IterationModel, StepFeatures

Array = NDArray[np.float64]
Solve = Callable[[Array, Array], Array]
SHARPNESSES = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
MIN_SAMPLES = 8
HOST_CANDIDATES = 12
CORNER_STEP = 1.2
CORNERS = tuple(0.25 * CORNER_STEP**n for n in range(54))  # in tokens; up to 3,900
MUST_REACH = 0.9  # of the error without it: what a term must do that others could stand for


@dataclass(frozen=True)
class StepSample:
    """A step that was timed."""

    step: StepFeatures
    seconds: float


@dataclass(frozen=True)
class FitError:
    """Relative errors |predicted/measured - 1| over a set of steps."""

    count: int
    mean: float
    maximum: float

    def __str__(self) -> str:
        return f"mean {self.mean:.1%}, max {self.maximum:.1%} over {self.count} steps"


def errors(model: IterationModel, samples: Seq[StepSample]) -> FitError:
    """How far the model is from these steps.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no steps to compare the model with")
    found = [abs(model.of_features(s.step) / s.seconds - 1) for s in samples]
    return FitError(len(found), sum(found) / len(found), max(found))


def held_out_error(model: IterationModel, samples: Seq[StepSample], fitted: Seq[StepSample]) -> FitError:
    """How far the model is from those of `samples` that it has not seen.

    A step that was fitted is known even where it was timed once more: what counts is the step, not the time.

    Raises:
        ValueError: no step is left.
    """
    known = {sample.step for sample in fitted}
    return errors(model, [sample for sample in samples if sample.step not in known])


def fit_terms(terms: Array, seconds: Array) -> Array:
    """Coefficients, none negative, with the least sum of squared relative errors `(terms @ x) / seconds - 1`.

    Args:
        terms: [steps, terms], how much of each term a step has
        seconds: [steps], what it took
    Returns:
        [terms], seconds for one of each
    """
    from scipy.optimize import nnls

    scaled = terms / seconds[:, None]
    # Terms differ by nine orders of magnitude (one step, millions of pairs): solve in units of each column's length.
    size = np.linalg.norm(scaled, axis=0)
    size[size == 0] = 1.0
    found: Array = nnls(scaled / size, np.ones(len(seconds)))[0] / size
    return found


def fit_iteration(
    samples: Seq[StepSample],
    *,
    vocab_share: float = 0.0,
    host_s: float | None = None,
    captured: CapturedSizes | None = None,
    solve: Solve = fit_terms,
) -> IterationModel:
    """The model with the least squared relative error.

    Args:
        samples: mixed ones among them, or the terms cannot be told apart
        vocab_share: see `IterationModel`; from the model's dimensions
        host_s: launch overhead, if known (0 on a CPU, where host and device are one); None: it is looked for as the
            floor under the shortest steps. What the device takes below that floor was not seen, only extrapolated:
            profile with CUDA graphs for the device, and get the overhead without them from `launch_overhead`
        captured: what the steps were padded to
        solve: finds the coefficients for a given corner and host time; called some hundred times

    Raises:
        ValueError: fewer than eight samples, also of those above `host_s`; or a time that is not positive and finite.
    """
    if wrong := [s.seconds for s in samples if not 0 < s.seconds < np.inf]:
        raise ValueError(f"a step took {wrong[0]} s; times are positive and finite: leave it out")
    if len(samples) < MIN_SAMPLES:
        raise ValueError(
            f"a fit needs at least {MIN_SAMPLES} timed steps, got {len(samples)}; profile without --quick"
        )
    table = _Table(samples, vocab_share, captured or CapturedSizes(), solve, on_cpu=host_s == 0.0)
    if host_s is not None and table.above(host_s).sum() < MIN_SAMPLES:
        raise ValueError(
            f"only {table.above(host_s).sum()} of {len(samples)} steps take longer than the host's {host_s} s; "
            f"at least {MIN_SAMPLES} must, or the device cannot be seen"
        )
    fits = [table.fit(host) for host in (_host_candidates(table) if host_s is None else [host_s])]
    # A floor under steps that reading the weights alone explains is no launch overhead.
    return min(
        fits, key=lambda fit: table.loss(fit) / (MUST_REACH**2 if fit.host_s and host_s is None else 1.0)
    )


# Of the linear part: the matrices, four more terms, three that only GPUs have, and one that only CPUs have.
COLUMNS, ON_GPUS, ON_CPUS = 9, [5, 6, 7], [8]
TERMS = ("reading weights", "matrix products", "constant", "attention pairs", "context", "sequences")


def fit_without(
    model: IterationModel, samples: Seq[StepSample], term: str | None, solve: Solve = fit_terms
) -> IterationModel:
    """The model fitted anew without one of TERMS, with the corner and the host time that it has; None: with all.

    Raises:
        ValueError: an unknown term, or a model without a corner.
    """
    if term is not None and term not in TERMS:
        raise ValueError(f"unknown term {term!r}; choose one of {', '.join(TERMS)}")
    if not (model.weight_s > 0 and model.token_s > 0):
        raise ValueError("the model has no corner: reading weights or matrix products take no time in it")
    table, corner = _Table(samples, model.vocab_share, model.captured), model.weight_s / model.token_s
    matrices = {
        "reading weights": table.tokens / corner,
        "matrix products": table.weights,
    }.get(term or "", table.matrices(corner, model.sharpness))
    free = table.above(model.host_s)
    columns = np.column_stack([matrices, table.others])[free]
    used = [n for n, name in enumerate(("matrices", *TERMS[2:])) if name != term and (n != 1 or model.t0_s)]
    used += (ON_GPUS if model.captured.batches else []) + (ON_CPUS if model.rows_s else [])
    found = np.zeros(COLUMNS)
    found[used] = solve(columns[:, used], table.seconds[free])
    refitted = table._model(found, corner, model.sharpness, model.host_s)
    if term == "reading weights":
        return replace(refitted, weight_s=0.0)
    return replace(refitted, token_s=0.0) if term == "matrix products" else refitted


def launch_overhead(model: IterationModel, samples: Seq[StepSample]) -> IterationModel:
    """The same device without CUDA graphs, with the host time that meets these samples (timed without them) best.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no steps to find the host time from")
    hosts = [0.0, *sorted({s.seconds for s in samples})]
    table = _Table(samples, model.vocab_share, CapturedSizes())
    launched = replace(model, captured=table.captured)
    return min((replace(launched, host_s=host) for host in hosts), key=table.loss)


def _host_candidates(table: _Table) -> list[float]:
    """None, and floors that several of the shortest steps lie near to: one step alone is no floor."""
    times = np.sort(table.seconds)
    few = times[: max(3, len(times) // 2)]
    runs = [float(np.mean(few[: n + 1])) for n in range(2, len(few)) if few[n] <= 1.2 * few[0]]
    return [0.0, *(host for host in runs[-HOST_CANDIDATES:] if table.above(host).sum() >= MIN_SAMPLES)]


class _Table:
    """Samples as columns."""

    def __init__(
        self,
        samples: Seq[StepSample],
        vocab_share: float,
        captured: CapturedSizes,
        solve: Solve = fit_terms,
        on_cpu: bool = False,
    ) -> None:
        steps = [s.step for s in samples]
        self.vocab_share, self.captured = vocab_share, captured
        self.solve = solve
        self.terms = [0, 2, 3, 4, *(ON_GPUS if captured.batches else [])]
        self.optional = [1, *(ON_CPUS if on_cpu else [])]
        self.samples = samples
        self.seconds: Array = np.array([s.seconds for s in samples])
        tokens, drawn = np.array(
            [captured.rows(s.tokens, s.drawn, s.sequences) for s in steps], dtype=float
        ).T
        self.weights: Array = np.where(drawn > 0, 1.0 + vocab_share, 1.0)
        self.tokens: Array = tokens + vocab_share * drawn

    @property
    def others(self) -> Array:
        """[steps, 8]: the terms beside the matrices."""
        return np.array(
            [
                [
                    1.0,
                    s.pairs,
                    s.context,
                    s.sequences,
                    not s.decodes_only,
                    s.short_pairs,
                    s.shared_context,
                    (s.tokens > 1) + self.vocab_share * (s.drawn > 1),
                ]
                for s in (sample.step for sample in self.samples)
            ],
            dtype=float,
        )

    def loss(self, model: IterationModel) -> float:
        """Sum of squared relative errors."""
        return sum((model.of_features(s.step) / s.seconds - 1) ** 2 for s in self.samples)

    def above(self, host_s: float) -> NDArray[np.bool_]:
        """Which steps say something of the device: those well above what the host takes."""
        return np.asarray(self.seconds > 1.1 * host_s)

    def fit(self, host_s: float) -> IterationModel:
        """The best for a host time, from the steps that take longer than it."""
        free = self.above(host_s)
        choices = [chosen for n in range(len(self.optional) + 1) for chosen in combinations(self.optional, n)]
        # A constant time and that of the weights differ only in the corner's shape, and rows only where one is alone.
        found = [
            (self._search(free, host_s, sorted([*self.terms, *chosen])), len(chosen)) for chosen in choices
        ]
        return min(found, key=lambda each: each[0][0] / MUST_REACH ** each[1])[0][1]

    def _search(
        self, free: NDArray[np.bool_], host_s: float, used: list[int]
    ) -> tuple[float, IterationModel]:
        """(root of the squared relative errors' sum, model) of the best corner."""
        others = self.others
        grid = [(corner, sharpness) for sharpness in SHARPNESSES for corner in CORNERS]
        best = min((self._solve(free, *each, used, others) for each in grid), key=lambda found: found[0])
        _, _, corner, sharpness = best
        # Between the corners of the grid.
        finer = np.geomspace(corner / CORNER_STEP, corner * CORNER_STEP, 21)
        distance, found, corner, sharpness = min(
            (self._solve(free, float(each), sharpness, used, others) for each in finer),
            key=lambda found: found[0],
        )
        return distance, self._model(found, corner, sharpness, host_s)

    def _solve(
        self,
        free: NDArray[np.bool_],
        corner: float,
        sharpness: float,
        used: list[int],
        others: Array | None = None,
    ) -> tuple[float, Array, float, float]:
        """(distance, coefficients, corner, sharpness) with the columns `used`: linear, given the last two."""
        others = self.others if others is None else others
        columns = np.column_stack([self.matrices(corner, sharpness), others])[free]
        found = np.zeros(COLUMNS)
        found[used] = self.solve(columns[:, used], self.seconds[free])
        distance = float(np.linalg.norm(columns @ found / self.seconds[free] - 1))
        return distance, found, corner, sharpness

    def matrices(self, corner: float, sharpness: float) -> Array:
        """[steps]: time of the matrices, in units of reading them once."""
        products = self.tokens / corner
        high, low = np.maximum(self.weights, products), np.minimum(self.weights, products)
        found: Array = high * (1 + (low / high) ** sharpness) ** (1 / sharpness)
        return found

    def _model(self, found: Array, corner: float, sharpness: float, host_s: float) -> IterationModel:
        weight, t0, pair, context, sequence, mixed, short, shared, rows = map(float, found)
        return IterationModel(
            t0_s=t0,
            weight_s=weight,
            token_s=weight / corner,
            pair_s=pair,
            context_s=context,
            sequence_s=sequence,
            host_s=host_s,
            vocab_share=self.vocab_share,
            sharpness=sharpness,
            short_pair_s=short,
            shared_context_s=shared,
            mixed_s=mixed,
            rows_s=rows,
            captured=self.captured,
        )
