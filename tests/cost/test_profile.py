"""The profiler runs real steps of a real engine, goes on where it was cut, and its record fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopd_lab.cli import main
from nanopd_lab.core import StepPlan
from nanopd_lab.cost.calibrate import (
    describe,
    fit_link,
    fit_profile,
    links_of,
    own_link,
    samples_of,
    with_launched,
)
from nanopd_lab.cost.files import CostModel, read_json
from nanopd_lab.cost.grid import Grid, Point, grid_for
from nanopd_lab.cost.hardware import load_model
from nanopd_lab.cost.iteration import COEFFICIENTS, CapturedSizes, IterationModel, StepFeatures
from nanopd_lab.cost.profile import StepTimer, profile
from nanopd_lab.cost.roofline import ChunkShape, ModelDims
from nanopd_lab.engine.config import EngineConfig
from nanopd_lab.engine.engine import Engine
from nanopd_lab.resources import data_dir

TINY = Grid((4, 12), (0, 20), (1, 3), (8, 30), num_mixed=8)
OPTIONS: dict[str, Any] = {
    "kv_cache_memory_bytes": 1 << 20,
    "device": "cpu",
    "progress": False,
    "transfers": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = EngineConfig("random:tiny", device="cpu", kv_cache_memory_bytes=1 << 20, block_size=4)
    return Engine(config)


def test_the_grid_keeps_to_the_engine_s_limits() -> None:
    grid = grid_for("cpu", quick=False)
    everything = grid.points(10**9, 10**9, 10**9, 16)
    assert {point.kind for point in everything} == {"prefill", "decode", "mixed"}
    assert everything == grid.points(10**9, 10**9, 10**9, 16)  # the same another day
    few = grid.points(max_tokens=200, max_blocks=500, max_len=1000, block_size=16)
    assert 10 < len(few) < len(everything)
    for point in few:
        assert point.tokens <= 200
        assert point.blocks(16) <= 500
        assert max(chunk.past + chunk.count for chunk in point.chunks) <= 1000
    mixed = [point for point in everything if point.kind == "mixed"]
    assert all(len({chunk.count > 1 for chunk in point.chunks}) == 2 for point in mixed)
    assert any(chunk.samples == 0 for point in mixed for chunk in point.chunks)


@pytest.mark.parametrize("point", grid_for("cpu", quick=True).points(10**9, 10**9, 10**9, 16)[::5])
def test_a_point_comes_back_from_its_record(point: Point) -> None:
    assert Point.from_record(json.loads(json.dumps(point.to_record()))) == point


def test_a_plan_is_what_the_point_says(engine: Engine) -> None:
    point = Point("mixed", (ChunkShape(1, 9), ChunkShape(6, 5), ChunkShape(7, 0, 0)))
    plan = StepTimer(engine).plan(point)
    assert [(c.count, c.start, c.samples) for c in plan.chunks] == [(1, 9, 1), (6, 5, 1), (7, 0, 0)]
    assert plan.num_decodes == 1
    tables = [chunk.sequence.blocks for chunk in plan.chunks]
    assert list(map(len, tables)) == [3, 3, 2]
    assert len({block for table in tables for block in table}) == 8  # nobody shares
    sampled = engine.runner.execute(plan)
    assert [len(tokens) for tokens in sampled] == [1, 1, 0]


def test_the_step_that_is_timed_is_the_whole_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    ran: list[StepPlan] = []
    execute = engine.runner.execute
    monkeypatch.setattr(engine.runner, "execute", lambda plan: ran.append(plan) or execute(plan))
    timer = StepTimer(engine, clock=lambda: float(next(ticks)))
    assert timer.seconds(Point("decode", (ChunkShape(1, 5),) * 2), repeats=4) == 1.0
    assert len(ran) == 4


def test_an_engine_that_works_ahead_is_timed_from_result_to_result(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    launch = engine.runner.launch

    class Seen:
        def __init__(self, plan: StepPlan) -> None:
            order.append("launch")
            self.inner = launch(plan)

        def result(self) -> Any:
            order.append("result")
            return self.inner.result()

    monkeypatch.setattr(engine.runner, "launch", Seen)
    monkeypatch.setattr(engine.loop, "ahead", True)
    ticks = iter(range(1000))
    timer = StepTimer(engine, clock=lambda: float(next(ticks)))
    assert timer.seconds(Point("decode", (ChunkShape(1, 5),)), repeats=2) == 2.0
    # Never a result before the step after it is launched, one that does not count, and nothing left under way.
    assert order == ["launch", "launch", "result", *3 * ["launch", "result"], "result"]


@pytest.mark.parametrize("launch_s", [0.5, 3.0, 6.0, 9.0, 14.0])
def test_a_host_that_is_late_at_first_makes_no_step_look_short(
    launch_s: float, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device takes 10 s a step, the host `launch_s` to launch one: served on and on, a step takes the longer."""
    host_s = device_s = 0.0

    class Launched:
        def __init__(self, plan: StepPlan) -> None:
            nonlocal host_s, device_s
            device_s = max(device_s, host_s) + 10.0
            self.ends_s = device_s
            host_s += launch_s

        def result(self) -> list[Any]:
            nonlocal host_s
            host_s = max(host_s, self.ends_s)
            return []

    monkeypatch.setattr(engine.runner, "launch", Launched)
    monkeypatch.setattr(engine.loop, "ahead", True)
    timer = StepTimer(engine, clock=lambda: host_s)
    assert timer.seconds(Point("decode", (ChunkShape(1, 5),)), repeats=3) == max(10.0, launch_s)


def test_not_finite_logits_are_an_error(engine: Engine) -> None:
    timer = StepTimer(engine)
    engine.cache.tensor.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"decode of 1 chunks: .*finite"):
        timer.seconds(Point("decode", (ChunkShape(1, 5),)), 1)


def test_a_profile_is_complete_and_fits(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    record = profile("random:tiny", grid=TINY, result=path, **OPTIONS)
    assert json.loads(path.read_text()) == record
    assert not list(tmp_path.glob("*.part"))
    samples = samples_of(record)
    assert [len(samples[kind]) for kind in ("prefill", "decode", "mixed")] == [4, 4, 8]
    assert all(sample.seconds > 0 for kind in samples.values() for sample in kind)
    assert record["provenance"]["machine"]["torch_threads"] == torch.get_num_threads()
    cost = fit_profile(record)
    assert cost.fit["errors"]["held_out"]["count"] == 4
    assert "held-out mixed" in describe(cost)


def test_pulls_between_workers_are_part_of_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    record = profile("random:tiny", grid=TINY, result=path, **{**OPTIONS, "transfers": True})
    assert json.loads(path.read_text()) == record
    rows = record["transfers"]
    assert {(row["transport"], row["source"], row["target"]) for row in rows} == {
        ("inproc", "cpu", "cpu"),
        ("shm", "cpu", "cpu"),
    }
    assert all(row["bytes"] == row["blocks"] * record["block_bytes"] for row in rows)
    assert sorted({row["blocks"] for row in rows}) == [1, 4, 16, 64, 128]
    assert all(len(row["seconds"]) == 7 and min(row["seconds"]) > 0 for row in rows)
    links = links_of(record)
    assert links.keys() == {"inproc", "shm"}
    assert own_link(record) == links["shm"]  # workers that don't share a process
    assert own_link(record, "inproc") == links["inproc"]
    with pytest.raises(ValueError, match=r"no pulls by 'p2p'; it has (inproc, shm|shm, inproc)"):
        own_link(record, "p2p")
    # A second run has nothing left to measure.
    assert profile("random:tiny", grid=TINY, result=path, **{**OPTIONS, "transfers": True}) == record


def test_the_host_time_without_graphs_comes_from_a_profile_without_them() -> None:
    share = 49152 * 576 / (30 * 576 * (2 * 9 * 64 + 2 * 3 * 64 + 3 * 1536))
    sizes = CapturedSizes((1, 2, 4, 8, 64), (64, 512))
    device = IterationModel(0.0, 5e-3, 2e-5, 1e-9, 5e-8, 0.0, vocab_share=share, captured=sizes)
    graphs, eager = synthetic(device), synthetic(replace(device, host_s=0.04, captured=CapturedSizes()))
    graphs["captured"] = {"batches": [1, 2, 4, 8, 64], "tokens": [64, 512]}
    cost = fit_profile(graphs)
    assert cost.fit["errors"]["held_out"]["mean"] < 0.01
    assert CostModel.from_record(json.loads(json.dumps(cost.to_record()))) == cost
    cost = with_launched(cost, eager)
    assert cost.fit["launched"]["host_s"] == pytest.approx(0.04, rel=0.02)
    assert cost.iteration.host_s < 0.01  # the model itself keeps its graphs
    assert "40.0" in describe(cost)
    assert "without CUDA graphs" in describe(cost)


def test_what_only_gpus_have_is_found_out() -> None:
    """Pairs of short chunks that take half as long again, their pasts in company, and steps with prompts 1 ms more."""
    share = 49152 * 576 / (30 * 576 * (2 * 9 * 64 + 2 * 3 * 64 + 3 * 1536))
    sizes = CapturedSizes((1, 2, 4, 8, 64), (64, 512))
    device = IterationModel(
        0.0,
        5e-3,
        2e-5,
        2e-8,
        5e-8,
        0.0,
        vocab_share=share,
        short_pair_s=1e-8,
        shared_context_s=1e-7,
        mixed_s=1e-3,
        captured=sizes,
    )
    profile = {**synthetic(device), "captured": {"batches": [1, 2, 4, 8, 64], "tokens": [64, 512]}}
    cost = fit_profile(profile)
    assert cost.iteration.short_pair_s == pytest.approx(1e-8, rel=0.2)
    assert cost.iteration.mixed_s == pytest.approx(1e-3, rel=0.1)
    assert cost.fit["errors"]["held_out"]["maximum"] < 0.02
    assert cost.iteration.shared_context_s == pytest.approx(1e-7, rel=0.2)
    assert "ns more a pair of a short chunk" in describe(cost)
    assert "µs more a token of context of one that is not alone" in describe(cost)


@pytest.mark.parametrize(("device", "read_s", "worst"), [("h100", 4.9e-3, 0.1), ("h200", 3.8e-3, 0.25)])
def test_the_recorded_gpu_profiles_are_met_within_the_target(
    device: str, read_s: float, worst: float
) -> None:
    record = read_json(data_dir() / "recorded" / f"profile-qwen3-8b-nvidia-{device}-2026-11-27.json")
    found, kept = fit_profile(record), load_model(f"{device}-qwen3-8b")
    held_out = found.fit["errors"]["held_out"]
    assert held_out["count"] >= 27
    assert held_out["mean"] <= 0.05
    assert held_out["maximum"] < worst
    assert found.iteration.short_pair_s == pytest.approx(kept.iteration.short_pair_s, rel=1e-3)
    assert found.iteration.captured == kept.iteration.captured
    assert found.iteration.weight_s == pytest.approx(kept.iteration.weight_s, rel=1e-3)
    # The weights at the read bandwidth measured on such cards, 3 and 4 TB/s, and what it takes to begin.
    assert found.iteration.weight_s == pytest.approx(read_s, rel=0.15)


def test_a_cut_profile_is_continued_and_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    record = profile("random:tiny", grid=TINY, result=path, **OPTIONS)
    kept = [row["seconds"][:] for row in record["points"]]
    for row in record["points"][5:]:
        del row["seconds"][1:]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"not complete.*1 of 3 visits"):
        fit_profile(record)
    again = profile("random:tiny", grid=TINY, result=path, **OPTIONS)
    assert [row["seconds"] for row in again["points"][:5]] == kept[:5]
    assert [row["seconds"][:1] for row in again["points"][5:]] == [each[:1] for each in kept[5:]]
    assert all(len(row["seconds"]) == 3 for row in again["points"])


def test_another_run_s_file_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile("random:tiny", grid=TINY, result=path, **OPTIONS)
    before = path.read_text()
    with pytest.raises(ValueError, match=r"dtype = 'float32', not 'bfloat16'.*name another file"):
        profile("random:tiny", grid=TINY, result=path, dtype="bfloat16", **OPTIONS)
    assert path.read_text() == before
    path.write_text(json.dumps({"schema": "nanopd-lab/profile/9"}))
    with pytest.raises(ValueError, match=r"profile/9.*profile/1"):
        profile("random:tiny", grid=TINY, result=path, **OPTIONS)
    with pytest.raises(ValueError, match="rounds is 2"):
        profile("random:tiny", rounds=2, **OPTIONS)


def synthetic(model: IterationModel) -> dict[str, Any]:
    """A profile as that model would make it."""
    points = grid_for("cpu", quick=False).points(10**9, 10**9, 10**9, 16)
    rows = [{**p.to_record(), "seconds": [model.of_features(StepFeatures.of(p.chunks))] * 3} for p in points]
    return {
        "schema": "nanopd-lab/profile/1",
        "provenance": {"machine": {"cpu": "a CPU", "gpus": []}},
        "settings": {"device": "cpu", "dtype": "float32", "threads": 1},
        "block_size": 16,
        "block_bytes": 737_280,
        "dims": {
            "name": "toy", "num_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_heads": 9,
            "num_kv_heads": 3, "head_dim": 64, "vocab_size": 49152, "tied_embeddings": True,
            "weight_itemsize": 4, "kv_itemsize": 4,
        },
        "points": rows,
    }  # fmt: skip


def test_fit_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = 49152 * 576 / (30 * 576 * (2 * 9 * 64 + 2 * 3 * 64 + 3 * 1536))
    planted = IterationModel(0.0, 40e-3, 2e-3, 7e-7, 3e-6, 1e-3, vocab_share=share, sharpness=2.0)
    (tmp_path / "profile.json").write_text(json.dumps(synthetic(planted)))
    transfer = data_dir() / "recorded/transfer-cpu-2026-11-25.json"
    arguments = ["fit", str(tmp_path / "profile.json"), "--transfer", str(transfer)]
    assert main([*arguments, "--result-filename", str(tmp_path / "model.json")]) == 0
    out = capsys.readouterr().out
    for word in ("t0", "a1", "a2", "a3", "α", "β", "threshold", "γ", "transfer rate", "held-out mixed"):
        assert word in out
    cost = CostModel.load(tmp_path / "model.json")
    assert cost.fit["errors"]["held_out"]["maximum"] < 0.01
    assert cost.iteration.token_s == pytest.approx(planted.token_s, rel=0.02)
    assert cost.iteration.pair_s == pytest.approx(planted.pair_s, rel=0.05)
    assert set(cost.source) == {"profile", "transfer"}
    # The recorded link: 4.0 ms for 16 blocks of 2.36 MB through shared memory between two processes.
    assert cost.transfer is not None
    assert cost.transfer.seconds(16, 16 * 2_359_296) == pytest.approx(4.0e-3, rel=0.1)


def test_the_recorded_profile_is_met_within_the_target() -> None:
    record = read_json(data_dir() / "recorded" / "profile-cpu-2026-11-25.json")
    found, kept = fit_profile(record), load_model("cpu-smollm2-fp32")
    held_out = found.fit["errors"]["held_out"]
    assert held_out["count"] == 16
    assert held_out["mean"] < 0.10
    assert held_out["maximum"] < 0.25
    assert found.iteration.captured == kept.iteration.captured == CapturedSizes()
    numbers = [{name: getattr(each.iteration, name) for name in COEFFICIENTS} for each in (found, kept)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-12)
    # Reading the weights: the same bandwidth as a large copy on that machine, 10.4 GB/s in transfer-cpu-2026-11-25.
    dims = ModelDims(**found.fit["dims"])
    assert dims.token_weights * 4 / found.iteration.weight_s == pytest.approx(10.4e9, rel=0.15)


def test_fit_refuses_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    record = synthetic(IterationModel(1e-3, 4e-3, 2e-3, 7e-7, 3e-6, 1e-3))
    with pytest.raises(ValueError, match="has 0 mixed steps"):
        fit_profile({**record, "points": [row for row in record["points"] if row["kind"] != "mixed"]})
    rows = [{"transport": "shm", "in_flight": 1, "processes": 1}]
    with pytest.raises(ValueError, match=r"no 'p2p'; it has shm"):
        fit_link({"schema": "nanopd-lab/transfer/1", "shape": {"block_bytes": 1}, "rows": rows}, "p2p")
    with pytest.raises(ValueError, match=r"transfer/2.*transfer bench"):
        fit_link({"schema": "nanopd-lab/transfer/2"}, "shm")
