"""The figures of routing show what the rules say, which promises are kept, and every request's route."""

from __future__ import annotations

from typing import Any

import ipywidgets
import numpy as np
import pytest
from matplotlib.figure import Figure

from nanopd_lab.bench.regret.cells import Cell
from nanopd_lab.bench.regret.grid import Bench, Settings
from nanopd_lab.bench.regret.runner import ATTAINED, Grid, run_grid
from nanopd_lab.core import SamplingParams
from nanopd_lab.cost.files import read_json
from nanopd_lab.cost.hardware import load_hardware, load_model
from nanopd_lab.cost.nanopd import published
from nanopd_lab.cost.roofline import ModelDims
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.model.shapes import shape_config
from nanopd_lab.resources import data_dir
from nanopd_lab.router import JobView, Outlook, Role, Slo, WorkerView, create_policy
from nanopd_lab.router.pair_rule import ByEstimate, RouterParts
from nanopd_lab.router.predictor import BucketedMean
from nanopd_lab.router.predictor.evaluation import LEVELS, Learning, replay
from nanopd_lab.router.predictor.log_lengths import OneBelief
from nanopd_lab.router.predictor.synthetic import workload
from nanopd_lab.sim import CostTime, SimConfig, SimResult, Simulator, Veiled
from nanopd_lab.sim.workload import AZURE_LIKE, poisson_arrivals
from nanopd_lab.viz.explorer import Explorer
from nanopd_lab.viz.lengths import calibration, reliability
from nanopd_lab.viz.race import kept_shares, race, recorded_regret, regret_view, slo_plane
from nanopd_lab.viz.routing import LOADS, TwoRoutes, decision_map, explanation_view, lanes, verdict
from nanopd_lab.viz.style import FAINT, STRATEGIES, png, strategy_colour

QWEN = ModelDims.from_config(shape_config("qwen3-8b"), name="Qwen3-8B", weight_itemsize=2)
PRIOR = load_hardware("rtx-4090").prior(QWEN)
RULE = published("rtx-4090")
COST = load_model("h100-qwen3-8b")
SLO = Slo(0.4, 0.012)


def texts(fig: Figure) -> str:
    found = [ax.get_title(loc="left") for ax in fig.axes] + [
        t.get_text() for ax in fig.axes for t in ax.texts
    ]
    return " ".join(found)


# ---------------------------------------------------------------------- the map


def edge(fig: Figure) -> float:
    """The load at which nanoPD's line is drawn."""
    return next(line.get_ydata()[0] for line in fig.axes[0].lines if line.get_linewidth() == 2)  # type: ignore[index]


def test_the_line_is_where_nanopds_rule_changes_its_mind() -> None:
    fig = decision_map(RULE, PRIOR)
    first = int(edge(fig) + 0.5)
    assert first == 3  # as recomputed from its parameters
    for prompt in (64, 8192):
        assert RULE.prefers_disaggregated(prompt, 200, first, first - 1)
        assert not RULE.prefers_disaggregated(prompt, 200, first - 1, first - 2)
    assert edge(decision_map(RULE, PRIOR, gamma=0.25)) > edge(fig)
    assert edge(decision_map(RULE, PRIOR, bandwidth_gbs=5.0)) > edge(fig)
    assert "two workers" in texts(fig)
    assert "published" in texts(decision_map(RULE, PRIOR, claim=1))


def test_verdicts_follow_the_promises() -> None:
    def verdicts(slo: Slo, bytes_per_s: float = 12.9e9) -> set[int]:
        routes = TwoRoutes(PRIOR, TransferModel(0.0, 0.0, bytes_per_s), slo, RULE.kv_bytes_per_token)
        return {verdict(*routes(p, n), slo) for p in (64, 2048, 8192) for n in (0, 8, 24)}

    assert verdicts(Slo(60.0, 1.0)) == {0}
    assert verdicts(Slo(1e-3, 1e-3)) == {3}
    assert 2 in verdicts(Slo(60.0, 0.0165))
    # Over a link of 0.2 GB/s moving breaks the promise, and staying does not.
    assert 1 in verdicts(Slo(60.0, 0.0165), 0.2e9)


def test_estimates_of_both_routes_are_the_policys() -> None:
    link = TransferModel(0.0, 0.0, 12.9e9)
    stays, moves = TwoRoutes(PRIOR, link, SLO, RULE.kv_bytes_per_token)(2048, 8)
    assert stays.outputs == 8
    assert moves.outputs == 0
    assert stays.ttft_s > moves.ttft_s
    moved_s = 2048 * RULE.kv_bytes_per_token / 12.9e9
    assert moves.tpot_s - stays.tpot_s == pytest.approx(moved_s / 199)


def test_every_slider_of_the_map_moves_it() -> None:
    sliders: dict[str, Any] = {
        "bandwidth_gbs": ipywidgets.FloatSlider(value=12.9, min=1, max=400),
        "gamma": ipywidgets.FloatSlider(value=1.0, min=0, max=4),
        "load": ipywidgets.IntSlider(value=8, min=0, max=24),
        "prompt": ipywidgets.IntSlider(value=2048, min=64, max=8192),
        "tpot_ms": ipywidgets.FloatSlider(value=18, min=15, max=40),
    }
    explorer = Explorer(lambda **values: decision_map(RULE, PRIOR, **values), **sliders)
    seen = {explorer.image.value}
    for name, value in zip(sliders, (2.0, 3.0, 20, 500, 17.0), strict=True):
        sliders[name].value = value
        assert explorer.error.value == ""
        seen.add(explorer.image.value)
    assert len(seen) == len(sliders) + 1


def test_the_map_asks_the_learners_part() -> None:
    asked = []

    def mine(queued_tokens: int, prompt_tokens: int, outputs: int, budget: int, step_s: Any) -> float:
        asked.append(outputs)
        return 99.0 if prompt_tokens else 0.0

    fig = decision_map(RULE, PRIOR, parts=RouterParts(ttft=mine))
    assert set(asked) == set(LOADS.tolist())
    assert "99.00 s" in texts(fig)


# ---------------------------------------------------------------------- the race


def simulate(name: str, slo: Slo = SLO) -> SimResult:
    outlook = Outlook.of(COST, slo)
    policy, roles = (
        (ByEstimate(outlook), [Role.MIXED] * 3) if name == "yours" else create_policy(name, 3, outlook)
    )
    requests = poisson_arrivals(60, 30.0, AZURE_LIKE, seed=3)
    return Simulator(
        Veiled(policy), roles, CostTime(COST.iteration), requests, SimConfig(num_blocks=20_000)
    ).run()


@pytest.fixture(scope="module")
def results() -> dict[str, SimResult]:
    return {name: simulate(name) for name in ("collocated", "1p2d", "2p1d", "yours")}


def test_strategies_have_their_colours_everywhere() -> None:
    assert strategy_colour("2p1d") == strategy_colour("10p6d") == STRATEGIES["xPyD"]
    assert strategy_colour("threshold-512") == STRATEGIES["threshold"]
    assert strategy_colour("adaptive:mean") == STRATEGIES["adaptive"]
    assert strategy_colour("nanopd-h20") == STRATEGIES["nanopd"]
    assert strategy_colour("least-loaded") == STRATEGIES["least-loaded"]
    assert strategy_colour("round-robin") == STRATEGIES["round-robin"]
    assert strategy_colour("what") == FAINT


def test_the_race_has_a_bar_for_each_and_shares_of_each_phase(results: dict[str, SimResult]) -> None:
    fig = race(results, SLO, {"first": 20, "rest": 40}, "a race")
    bars, parts = fig.axes
    widths = [bar.get_width() for bar in bars.patches]  # type: ignore[attr-defined]
    assert widths == sorted(result.goodput(SLO) for result in results.values())
    drawn = sorted(float(line.get_xdata()[0]) for line in parts.lines)  # type: ignore[index]
    expected = sorted(
        100 * sum(record.meets(SLO) for record in part) / len(part)
        for result in results.values()
        for part in (result.records[:20], result.records[20:])
    )
    assert drawn == pytest.approx(expected)


def test_each_request_has_two_ticks(results: dict[str, SimResult]) -> None:
    fig = lanes(results["yours"].records, "first fit", [1.0])
    segments = sum(len(c.get_segments()) for c in fig.axes[0].collections)  # type: ignore[attr-defined]
    routes = [record.path.route for record in results["yours"].records if record.path]
    used = {(side, name) for route in routes if route for side, name in enumerate(route)}
    workers = {name for _, name in used}
    assert segments == 2 * 60 + 2 * len(workers) - len(used)  # an empty row has one that is not drawn
    assert len(fig.axes[0].get_yticklabels()) == len(workers)


def test_shares_of_kept_promises_grow_with_what_is_promised(results: dict[str, SimResult]) -> None:
    shares = kept_shares(results["collocated"], [0.01, 0.4, 10.0], [0.001, 0.012, 1.0])
    assert shares.shape == (3, 3)
    assert (np.diff(shares, axis=0) >= 0).all()
    assert (np.diff(shares, axis=1) >= 0).all()
    assert shares[-1, -1] == 1
    assert shares[1, 1] == pytest.approx(results["collocated"].attainment(SLO))
    assert shares[0, 0] == 0


def test_the_plane_says_who_is_best_where(results: dict[str, SimResult]) -> None:
    three = {name: results[name] for name in ("collocated", "1p2d", "2p1d")}
    ttfts, tpots = np.geomspace(0.02, 2, 9).tolist(), np.geomspace(0.006, 0.03, 8).tolist()
    fig = slo_plane(three, ttfts, tpots, "plane")
    winners = fig.axes[0].collections[0].get_array().reshape(8, 9)  # type: ignore[union-attr]
    kept = [kept_shares(result, ttfts, tpots) for result in three.values()]
    for row, column in np.ndindex(8, 9):
        best = sorted(each[row, column] for each in kept)
        if best[-1] - best[-2] > 0.011:
            assert kept[int(winners[row, column])][row, column] == best[-1]
        elif best[-1] == best[-2]:
            assert winners[row, column] == 3
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert len(labels) == 4
    assert png(fig) != png(slo_plane(three, ttfts[1:], tpots, "plane"))


def test_an_explanation_shows_the_terms_of_every_candidate() -> None:
    policy, _ = create_policy("nanopd-rtx-4090", 2)
    workers = [WorkerView(f"w{n}", Role.MIXED, decoding=9 * n) for n in range(2)]
    job = JobView(900, 900, SamplingParams(max_tokens=200), 0.0)
    decision = policy.choose(job, workers, 0.0)
    found = decision.explain()  # type: ignore[union-attr]
    fig = explanation_view(found, "why", "seconds")
    (ax,) = fig.axes
    shown = {name for each in found.candidates for name, value in each.terms.items() if value}
    assert 0 < len(shown) < len(found.candidates[0].terms)  # what is 0 everywhere needs no colour
    assert len(ax.patches) == len(shown) * len(found.candidates)
    ends = [
        max(p.get_x() + p.get_width() for p in ax.patches if round(p.get_y() + 0.4) == row)
        for row in range(2)
    ]  # type: ignore[attr-defined]
    assert ends == pytest.approx([each.cost for each in found.candidates])
    assert ax.get_yticklabels()[0].get_text() == f"{found.route}  chosen"


# ---------------------------------------------------------------------- regret and lengths


def test_regret_is_shown_against_the_oracle() -> None:
    bench = Bench(Settings(workers=2, num_prompts=24, simulations=12), COST)
    cells = tuple(Cell("chat", "steady", "ttft:400 tpot:12", None, load) for load in (0.9, 1.2))
    knees = {cell.group: 14.0 for cell in cells}
    before = {"settings": bench.settings.as_json(), "trace": None, "attained_at_knee": ATTAINED, "units": []}
    grid = Grid(cells, ("collocated", "1p1d", "nanopd"), (0,))
    record = run_grid(bench, grid, before={**before, "knees": knees}, progress=False)
    fig = regret_view(record, "two workers")
    bars, each = fig.axes[:2]
    assert len(bars.patches) == 4  # with the best static one
    shares = each.collections[0].get_array().reshape(4, 2)  # type: ignore[union-attr]
    widths = [bar.get_width() for bar in bars.patches]  # type: ignore[attr-defined]
    assert widths == pytest.approx(shares.mean(axis=1))
    assert widths == sorted(widths)
    assert shares.max() <= 100
    found = recorded_regret()
    assert found is None or found["schema"] == record["schema"]


def test_calibration_shows_what_quantiles_hold() -> None:
    requests, _ = workload("alike", 300, seed=2)
    learning = Learning(cancelled=True)
    replays = {
        name: replay(each, requests, 4096, learning)
        for name, each in (("yours", OneBelief()), ("nanoPD's mean", BucketedMean()))
    }
    shares = reliability(replays, skip=100)
    assert shares["yours"] == sorted(shares["yours"])
    assert max(abs(a - b) for a, b in zip(shares["yours"], LEVELS, strict=True)) < 0.12
    assert len(set(shares["nanoPD's mean"])) == 1
    recorded = read_json(data_dir() / "recorded" / "predictor-azure-code-2026-11-25.json")
    fig = calibration(replays, recorded, skip=100)
    drawn = {line.get_label(): list(line.get_ydata()) for line in fig.axes[0].lines}  # type: ignore[arg-type]
    assert drawn["yours"] == pytest.approx([100 * share for share in shares["yours"]])
    assert len(fig.axes[1].patches) == len(recorded["scenarios"]["delayed"])
