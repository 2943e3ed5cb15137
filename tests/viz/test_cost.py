"""The figures of the cost model show every step that was measured, and what each model says of it."""

from __future__ import annotations

from dataclasses import replace

import ipywidgets
import pytest
from matplotlib.figure import Figure

from nanopd_lab.cost.fitting import StepSample, fit_without
from nanopd_lab.cost.grid import Grid, Point
from nanopd_lab.cost.iteration import IterationModel, StepFeatures
from nanopd_lab.cost.nanopd import NanoPDModel
from nanopd_lab.viz.cost import BAND, MOST_ERROR, formula_breaks, launch_overhead_view, prediction
from nanopd_lab.viz.explorer import Explorer

MODEL = IterationModel(
    t0_s=0.0, weight_s=0.03, token_s=2e-3, pair_s=1e-6, context_s=4e-6, sequence_s=5e-4, sharpness=2.0
)
POINTS = Grid((8, 64, 256), (0, 500), (1, 4, 16), (100, 400), 12).points(1000, 10_000, 10_000, 16)
TIMED = [(point, 1.05 * MODEL.seconds(point.chunks)) for point in POINTS]


def groups() -> dict[str, list[StepSample]]:
    found = {
        kind: [StepSample(StepFeatures.of(p.chunks), s) for p, s in TIMED if p.kind == kind]
        for kind in ("prefill", "decode", "mixed")
    }
    return {**found, "mixed": found["mixed"][::2], "held out": found["mixed"][1::2]}


def points(fig: Figure, axis: int) -> list[tuple[float, float]]:
    lines = [line for line in fig.axes[axis].lines if line.get_linestyle() == "None"]
    return [
        (float(x), float(y))
        for line in lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)  # type: ignore[arg-type]
    ]


def test_every_step_is_a_point_at_its_error() -> None:
    fig = prediction(groups(), MODEL, "measured here")
    left, right = points(fig, 0), points(fig, 1)
    assert len(left) == len(right) == len(TIMED)
    assert all(y == pytest.approx(x / 1.05) for x, y in left)
    assert all(y == pytest.approx(100 * (1 / 1.05 - 1)) for _, y in right)
    assert "4.8% on average, 5% at most" in fig.axes[1].get_title(loc="left")
    assert "measured here" in fig.axes[0].get_title(loc="left")
    assert BAND == 0.1


def test_what_is_far_off_stays_in_the_picture() -> None:
    fig = prediction(groups(), replace(MODEL, host_s=50.0), "measured here")
    assert max(y for _, y in points(fig, 1)) == pytest.approx(100 * MOST_ERROR)


def test_a_term_that_is_left_out_moves_the_points() -> None:
    steps = groups()
    fitted = [s for kind in ("prefill", "decode", "mixed") for s in steps[kind]]

    def view(term: str) -> Figure:
        return prediction(steps, fit_without(MODEL, fitted, term), "measured here", f"without {term}")

    terms = ["attention pairs", "context", "reading weights", "matrix products"]
    explorer = Explorer(view, term=ipywidgets.SelectionSlider(options=terms))
    seen = {explorer.image.value}
    for term in terms[1:]:
        explorer.controls["term"].value = term
        seen.add(explorer.image.value)
    assert len(seen) == len(terms)
    assert explorer.error.value == ""


def test_the_formulas_are_drawn_beside_the_measurements() -> None:
    nanopd = NanoPDModel.fit(TIMED)
    fig = formula_breaks(TIMED, MODEL, nanopd, "recorded")
    prompt, _, batch = (points(fig, axis) for axis in range(3))
    whole = [p for p, _ in TIMED if p.kind == "prefill" and p.chunks[0].past == 0]
    assert [x for x, _ in prompt] == [p.tokens for p in whole]
    assert [x for x, _ in batch] == [1, 4, 16]
    flat = [line for line in fig.axes[0].lines if line.get_linestyle() == "--"]
    assert set(flat[0].get_ydata()) == {1e3 * nanopd.alpha_s}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both are needed"):
        formula_breaks([(Point("mixed", p.chunks), s) for p, s in TIMED], MODEL, nanopd, "recorded")


def test_launch_overhead_is_drawn_over_the_same_steps() -> None:
    graphs = groups()["decode"]
    launched = [replace(s, seconds=max(s.seconds, 0.05)) for s in graphs]
    fig = launch_overhead_view(graphs, launched[1:], 0.05, "recorded")
    assert points(fig, 0) == [
        (pytest.approx(1e3 * a.seconds), pytest.approx(1e3 * b.seconds))
        for a, b in zip(graphs[1:], launched[1:], strict=True)
    ]
    assert "a host of 50.0 ms" in " ".join(t.get_text() for t in fig.axes[0].get_legend().get_texts())
    with pytest.raises(ValueError, match="no step was timed both"):
        launch_overhead_view(graphs[:1], launched[1:], 0.05, "recorded")
