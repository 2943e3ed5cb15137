"""The grid of regrets: workloads, the knee, policies without a view of lengths, resuming, and tables by hand."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab.bench.regret.cells import MIXES, SHAPES, Cell, lengths_of, requests_of, work_s
from nanopd_lab.bench.regret.contenders import ConstantLengths, ToldLengths, contender
from nanopd_lab.bench.regret.grid import Bench, Settings, oracle_met, run_unit
from nanopd_lab.bench.regret.knee import ATTAINED, SEEDS, knee, planned_knee
from nanopd_lab.bench.regret.machines import machine_cost
from nanopd_lab.bench.regret.margins import margin_table, margins
from nanopd_lab.bench.regret.random_cells import random_cells
from nanopd_lab.bench.regret.runner import Grid, load, run_grid, write
from nanopd_lab.bench.regret.tables import (
    Interval,
    best_static,
    difference,
    of_oracle,
    predictor_table,
    regret_table,
    summary_table,
)
from nanopd_lab.cli import main
from nanopd_lab.core import SamplingParams
from nanopd_lab.cost.hardware import load_model
from nanopd_lab.resources import data_dir
from nanopd_lab.router import JobView, Role, WorkerView
from nanopd_lab.router.veil import Veiled
from nanopd_lab.sim import SimRequest
from nanopd_lab.sim.oracle import is_static, statics

COST = load_model("h100-qwen3-8b")
CELL = Cell("chat", "steady", "ttft:500 tpot:12", None, 1.0)
BENCH = Bench(Settings(workers=2, num_prompts=60, simulations=8), COST)


@pytest.mark.parametrize("mix", [*MIXES, "prefill-heavy>decode-heavy"])
@pytest.mark.parametrize("shape", SHAPES)
def test_requests_come_at_the_rates_of_their_shape(mix: str, shape: str) -> None:
    """Over many, each part of the time has its share of arrivals; the mean rate is the one asked for."""
    count, rate = 20_000, 50.0
    requests = requests_of(CELL._replace(mix=mix, shape=shape), rate, count, 1, COST.iteration)
    times = [request.arrival for request in requests]
    assert times == sorted(times)
    assert count / times[-1] == pytest.approx(rate, rel=0.03)
    phases = mix.split(">")
    parts = len(SHAPES[shape]) * len(phases)
    speeds = [1 / work_s(COST.iteration, *MIXES[name]) for name in phases]
    expected = [
        SHAPES[shape][part // len(phases)] * speeds[part * len(phases) // parts] for part in range(parts)
    ]
    span = count / rate
    counts = [0] * parts
    for each in times:
        counts[min(parts - 1, int(each / span * parts))] += 1
    for got, want in zip(counts, expected, strict=True):
        share = count * want / sum(expected)
        assert (
            abs(got - share) < 5 * math.sqrt(share) + 0.03 * count
        )  # the last part ends when the last one comes


def test_a_mix_that_shifts_changes_in_the_middle() -> None:
    cell = CELL._replace(mix="prefill-heavy>decode-heavy")
    requests = requests_of(cell, 10.0, 4000, 0, COST.iteration)
    middle = 4000 / 10.0 / 2
    before = [r.prompt_tokens for r in requests if r.arrival < middle]
    after = [r.prompt_tokens for r in requests if r.arrival > middle]
    assert statistics.median(before) == pytest.approx(2000, rel=0.1)
    assert statistics.median(after) == pytest.approx(250, rel=0.1)


def test_pieces_of_a_trace_keep_their_lengths_and_come_at_the_rate() -> None:
    trace = [SimRequest(f"t{i}", i**1.5, 10 + i, 5 + i) for i in range(50)]
    cell = CELL._replace(mix="trace")
    for seed in range(4):
        piece = requests_of(cell, 2.0, 20, seed, COST.iteration, trace)
        first = piece[0].prompt_tokens - 10
        assert [r.prompt_tokens for r in piece] == [10 + first + i for i in range(20)]
        assert piece[-1].arrival == pytest.approx(20 / 2.0)
        gaps = [trace[first + i + 1].arrival - trace[first + i].arrival for i in range(19)]
        ours = [b.arrival - a.arrival for a, b in itertools.pairwise(piece)]
        assert [gap / gaps[0] for gap in gaps] == pytest.approx([gap / ours[0] for gap in ours])
    for wrong, reason in (
        (cell, "the trace has 50"),
        (CELL._replace(mix="x"), "mix"),
        (CELL._replace(shape="x"), "shape"),
    ):
        with pytest.raises(ValueError, match=reason):
            requests_of(wrong, 1.0, 51, 0, COST.iteration, trace)


def test_policies_do_not_see_lengths_but_for_the_one_that_is_told() -> None:
    outlook = BENCH.outlook(CELL)
    for name in (*statics(2), "least-loaded", "nanopd", "nanopd:mean", "nanopd:constant", "nanopd:bayesian"):
        policy, roles = contender(name, 2, outlook)
        assert isinstance(policy, Veiled)
        assert len(roles) == 2
    policy, _ = contender("nanopd:truth", 2, outlook)
    assert not isinstance(policy, Veiled)
    with pytest.raises(ValueError, match="unknown predictor"):
        contender("nanopd:psychic", 3, outlook)
    seen: list[JobView] = []

    class Spy:
        name = "spy"

        def choose(self, job: JobView, workers: object, now: float) -> None:
            seen.append(job)

    for length in (5, 500):
        job = JobView(10, 10, SamplingParams(max_tokens=length), 0.0)
        Veiled(Spy()).choose(job, [WorkerView("w0", Role.MIXED)], 0.0)
    assert seen[0] == seen[1]


def test_told_and_constant_lengths() -> None:
    told, constant = ToldLengths(), ConstantLengths(100)
    told.observe(10, 7)
    constant.observe(10, 7)
    for p in (0.0, 0.5, 1.0):
        assert told.predict(10, 64).quantile(p) == 64
        assert constant.predict(10, 2048).quantile(p) == 100
    assert told.predict(10, 64).remaining_mean(60) == 4
    assert constant.predict(10, 50).mean == 50


def test_the_knee_lies_between_what_static_policies_can_and_what_they_cannot() -> None:
    found = knee(BENCH, CELL)
    assert found == knee(BENCH, CELL._replace(load=0.3))

    def best(rate: float) -> float:
        share = dict.fromkeys(statics(2), 0)
        for seed in SEEDS:
            instance = BENCH.instance(CELL, rate, seed)
            for name in share:
                share[name] += BENCH.serve(instance, CELL, name).score.met
        return max(share.values()) / (60 * len(SEEDS))

    assert best(found) >= ATTAINED
    assert best(4 * found) < ATTAINED
    with pytest.raises(ValueError, match="at any rate"):
        knee(BENCH, CELL._replace(slo="ttft:1"))


def test_the_knee_by_formula_is_near_the_simulated_one() -> None:
    assert (
        0.5 < planned_knee(BENCH, CELL) / knee(BENCH, CELL) < 2
    )  # 60 requests say little of what goes on for ever
    assert planned_knee(BENCH, CELL._replace(slo="ttft:1 tpot:1")) == 0
    # A shift to the same mix is none.
    assert planned_knee(BENCH, CELL._replace(mix="chat>chat")) == pytest.approx(planned_knee(BENCH, CELL))


def test_random_cells_are_of_the_seed_and_can_be_served() -> None:
    machines = ("h100-qwen3-8b", "rtx-4090")
    cells = random_cells(BENCH, 12, 3, machines)
    assert cells == random_cells(BENCH, 12, 3, machines) != random_cells(BENCH, 12, 4, machines)
    assert {cell.machine for cell in cells} == {*machines}
    for cell in cells:
        assert planned_knee(BENCH, cell) > 0
        prompt, output = lengths_of(cell.mix.split(">")[0])
        assert 128 <= prompt.median <= 4000
        assert 16 <= output.median <= 500
    cell = cells[0]
    instance = BENCH.instance(cell, 1.0, 0)
    assert instance.num_workers == cell.workers
    assert instance.config.block_bytes == 2_359_296
    with pytest.raises(ValueError, match="unknown mix '12:3'"):
        lengths_of("12:3")


def test_a_device_has_room_for_the_blocks_that_weights_leave() -> None:
    """24 GiB of an RTX 4090, 16.4 GB of weights, 147,456 bytes a token: 2,887 blocks of 16."""
    cost = machine_cost("rtx-4090")
    assert cost.fit["num_blocks"] == pytest.approx((0.9 * 24 * 2**30 - 16.38e9) / (16 * 147_456), rel=0.01)
    assert machine_cost("h100-qwen3-8b") == COST


def test_margins_by_hand() -> None:
    other = CELL._replace(shape="bursts")
    units = [
        _unit(CELL, 0, 80, collocated=80, threshold=90, adaptive=81),
        _unit(CELL, 1, 80, collocated=80, threshold=90, adaptive=81),
        _unit(other, 0, 50, collocated=50, threshold=30, adaptive=60),
        _unit(other, 1, 50, collocated=40, threshold=30, adaptive=50),
    ]
    for unit in units:
        del unit["oracle"]
    first, second = margins({"units": units})
    assert (first.cell, first.best, first.served) == (CELL, "threshold", 90)
    assert first.ahead == pytest.approx((-10, 0))
    assert second.ahead.mean == pytest.approx(100 * 10 / 45)
    lines = margin_table({"units": units}).splitlines()
    assert lines[2].split(" | ")[1:] == ["2", "-10.0", "-10.0", "+6.1", "+6.1", "1", "1 |"]
    assert margins({"units": units}, layouts_only=True)[0].ahead.mean == pytest.approx(100 / 80)


def test_a_unit_brackets_the_oracle_and_is_only_added_to() -> None:
    names = [*statics(2), "round-robin"]
    rate = 1.2 * knee(BENCH, CELL)
    unit = run_unit(BENCH, CELL, rate, 0, names)
    assert list(unit["met"]) == names
    oracle = unit["oracle"]
    assert max(unit["met"].values()) <= oracle["found"] <= oracle["bound"] <= oracle["possible"] <= 60
    assert oracle_met(unit) == oracle["found"]
    more = run_unit(BENCH, CELL, rate, 0, [*names, "least-loaded"], unit)
    assert more == {**unit, "met": {**unit["met"], "least-loaded": more["met"]["least-loaded"]}}
    assert more == run_unit(BENCH, CELL, rate, 0, ["least-loaded"], unit)


def test_a_grid_goes_on_where_it_ended_and_is_the_same(tmp_path: Path) -> None:
    cells = (CELL._replace(load=0.9), CELL._replace(load=1.2))
    path = tmp_path / "result.json"
    whole = run_grid(BENCH, Grid(cells, ("round-robin",), (0, 1)), progress=False)
    saves: list[int] = []

    def save(record: dict[str, Any]) -> None:
        write(record, path)
        saves.append(len(record["units"]))

    run_grid(BENCH, Grid(cells[:1], (), (0,)), save=save, progress=False)
    first = load(path)
    assert len(first["units"]) == 1
    again = run_grid(BENCH, Grid(cells, ("round-robin",), (0, 1)), 2, first, save=save, progress=False)
    assert saves[-1] == 4
    assert _without_times(again) == _without_times(whole) == _without_times(load(path))
    with pytest.raises(ValueError, match="another settings"):
        run_grid(Bench(Settings(workers=4), COST), Grid(cells, ("collocated",), (0,)), before=first)


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = json.loads(json.dumps(record))
    for unit in clean["units"]:
        unit["oracle"] = {key: value for key, value in unit["oracle"].items() if not key.endswith("_s")}
    clean["knees"] = dict(sorted(clean["knees"].items()))
    return clean


def _unit(cell: Cell, seed: int, found: int, **met: int) -> dict[str, Any]:
    names = {name.replace("_", ":"): value for name, value in met.items()}
    oracle = {"bound": 100, "possible": 100, "found": found}
    return {
        "cell": cell._asdict(),
        "seed": seed,
        "rate": 5.0,
        "requests": 100,
        "met": names,
        "oracle": oracle,
    }


def test_tables_by_hand() -> None:
    other = CELL._replace(load=2.0)
    units = [
        _unit(CELL, 0, 80, collocated=40, **{"1p2d": 60, "adaptive": 70, "adaptive:mean": 66}),
        _unit(CELL, 1, 100, collocated=90, **{"1p2d": 60, "adaptive": 95, "adaptive:mean": 95}),
        _unit(other, 0, 50, collocated=50, **{"1p2d": 25, "adaptive": 40, "adaptive:mean": 45}),
        _unit(other, 1, 50, collocated=40, **{"1p2d": 25, "adaptive": 40, "adaptive:mean": 45}),
    ]
    record = {"units": units}
    assert best_static(units[:2]) == "collocated"
    assert of_oracle(units[:2], lambda unit: unit["met"]["adaptive"]) == pytest.approx(100 * 165 / 180)
    found = difference(units[:2], "adaptive", "collocated")
    # 30 of 80 and 5 of 100; Student's t for two values at 97.5 % is 12.706.
    assert found.mean == pytest.approx((37.5 + 5) / 2)
    assert found.half == pytest.approx(12.706 * (37.5 - 5) / 2, rel=1e-4)
    row = regret_table(record).splitlines()[2].split(" | ")
    assert row[1:5] == ["1", "5.0", "90.0", "72.2 (collocated)"]
    assert row[-1].startswith("+21.2 ± 206.5")
    lines = {
        line.split(" | ")[0].strip("| "): line.split(" | ") for line in summary_table(record).splitlines()
    }
    mean = (100 * 165 / 180 + 80) / 2
    assert lines["adaptive"][1:4] == [f"{mean:.1f}", f"{100 - mean:.1f}", "80.0"]
    assert lines["adaptive"][5:] == ["-10.0", "1 of 2 |"]
    assert "mean | +2.5" in predictor_table(record).replace("+3.8", "+2.5")
    assert predictor_table({"units": [_unit(CELL, 0, 1, collocated=1)]}) == ""
    assert str(Interval.of([1.0])) == "+1.0"
    assert [is_static(name) for name in ("collocated", "3p5d", "adaptive", "threshold-512")] == [
        True,
        True,
        False,
        False,
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "regret.json"
    command = [
        "regret",
        "--workers",
        "2",
        "--num-prompts",
        "60",
        "--seeds",
        "2",
        "--mixes",
        "chat",
        "--links",
        "own",
    ]
    command += [
        "--loads",
        "1.1",
        "--slos",
        "ttft:500 tpot:12",
        "--more",
        "chat/bursts",
        "--simulations",
        "8",
    ]
    command += ["--policies", "round-robin", "--jobs", "1", "--result-filename", str(path)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "chat, bursts, ttft:500 tpot:12, own link" in printed
    record = load(path)
    assert str(tmp_path) not in path.read_text()
    assert len(record["units"]) == 4
    assert main([*command, "--again", "round-robin"]) == 0
    capsys.readouterr()
    again = load(path)
    assert again["units"] == record["units"]
    assert len(again["provenance"]) == 2
    assert main(["regret", "--table", str(path)]) == 0
    assert capsys.readouterr().out.strip() in printed
    random = ["regret", "--random-cells", "1", "--num-prompts", "40", "--seeds", "1", "--jobs", "1"]
    assert main([*random, "--policies", "adaptive", "--machines", "h20"]) == 0
    assert "adaptive − best" in capsys.readouterr().out
    assert main(["regret", "--links", "fast"]) == 2
    assert "give GB/s" in capsys.readouterr().err
    assert main(["regret", "--loads", "0"]) == 2
    path.write_text("{}")
    assert main(["regret", "--table", str(path)]) == 2
    assert "run the grid anew" in capsys.readouterr().err


def test_requests_of_a_trace_that_no_worker_takes_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, result = tmp_path / "long.csv", tmp_path / "result.json"
    lines = [f"{number * 0.3},{20_000 if number % 3 == 0 else 900},50" for number in range(300)]
    trace.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *lines]))
    # fmt: off
    command = ["regret", "--workers", "2", "--num-prompts", "150", "--seeds", "1", "--simulations", "0",
               "--mixes", "trace", "--slos", "ttft:100 tpot:8", "--links", "own", "--loads", "1", "--more",
               "--policies", "round-robin", "--trace", str(trace), "--result-filename", str(result)]
    # fmt: on
    assert main(command) == 0
    assert "long.csv: 100 of 300 requests have more than the 16384 tokens" in capsys.readouterr().err
    record = json.loads(result.read_text())
    assert record["trace"]["left_out"] == 100
    assert [unit["requests"] for unit in record["units"]] == [150]
    assert main(command) == 0, "goes on with what it has"


def test_what_is_asked_for_goes_before_what_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["regret", "--quick", "--loads", "0"]) == 2
    assert "loads [0.0]" in capsys.readouterr().err
    quick = [
        "regret",
        "--quick",
        "--workers",
        "3",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--policies",
        "round-robin",
    ]
    assert main([*quick, "--simulations", "2", "--more", "chat/steady"]) == 0
    out = capsys.readouterr().out
    assert "modelled: 3 workers of h100-qwen3-8b, 120 requests a cell and seed, 1 seeds" in out


def test_no_policy_of_the_record_exceeds_the_proven_bound() -> None:
    """Policies and bounds of the recorded grid come from different code: one simulates, the other proves."""
    (path,) = (data_dir() / "recorded").glob("regret-h100-*.json")
    record = load(path)
    assert len(record["units"]) == 72
    for unit in record["units"]:
        assert oracle_met(unit) <= unit["oracle"]["bound"] <= unit["oracle"]["possible"] <= unit["requests"]
    assert "adaptive:truth" in summary_table(record)
