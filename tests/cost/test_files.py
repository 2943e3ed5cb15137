"""Cost files and hardware files: they come back as written, say where each figure is from, and refuse clearly."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab.cost.files import SCHEMA, CostModel
from nanopd_lab.cost.hardware import hardware_names, load_hardware, load_model, model_names
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.roofline import ModelDims
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.model.shapes import shape_config
from nanopd_lab.resources import data_dir

ITERATION = IterationModel(1e-3, 2e-3, 3e-5, 4e-9, 5e-8, 6e-6, 7e-3, 0.25, 2.0)
QWEN = ModelDims.from_config(shape_config("qwen3-8b"), name="qwen3-8b", weight_itemsize=2)


@pytest.mark.parametrize("link", [None, TransferModel(1e-3, 1e-6, 12e9), TransferModel(1e-3, 1e-6, math.inf)])
def test_a_model_comes_back_as_it_was_saved(link: TransferModel | None, tmp_path: Path) -> None:
    saved = CostModel("toy", "a device", ITERATION, link, {"date": "today"}, {"held_out_mean": 0.03})
    saved.save(tmp_path / "model.json")
    assert CostModel.load(tmp_path / "model.json") == saved
    assert "Infinity" not in (tmp_path / "model.json").read_text()  # not JSON


@pytest.mark.parametrize("schema", ["nanopd-lab/cost-model/2", "nanopd-lab/ceilings/1", None])
def test_another_schema_is_refused_by_name(schema: str | None) -> None:
    record = {**CostModel("m", "d", ITERATION).to_record(), "schema": schema}
    with pytest.raises(ValueError, match="nanopd-lab fit") as caught:
        CostModel.from_record(record, "old.json")
    assert all(part in str(caught.value) for part in ("old.json", repr(schema), SCHEMA))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t0_s": -1.0}, r"t0_s is -1\.0"),
        ({"t0_s": "fast"}, "t0_s is 'fast'; it must be a number"),
        ({"t0": 1.0}, "unknown field 't0'"),
    ],
)
def test_bad_coefficients(change: dict[str, Any], message: str) -> None:
    record = CostModel("m", "d", ITERATION).to_record()
    record["iteration"] |= change
    with pytest.raises(ValueError, match=f"bad.json: {message}"):
        CostModel.from_record(record, "bad.json")


def test_what_is_missing_and_what_is_not_json(tmp_path: Path) -> None:
    record = CostModel("m", "d", ITERATION).to_record()
    with pytest.raises(ValueError, match="x: 'iteration' is missing"):
        CostModel.from_record({k: v for k, v in record.items() if k != "iteration"}, "x")
    del record["iteration"]["pair_s"]
    with pytest.raises(ValueError, match=r"x: .*pair_s"):
        CostModel.from_record(record, "x")
    (tmp_path / "cut.json").write_text('{"schema": ')
    with pytest.raises(ValueError, match=r"cut.json is not JSON"):
        CostModel.load(tmp_path / "cut.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list.json holds a list"):
        CostModel.load(tmp_path / "list.json")


def test_every_file_in_the_folder_loads() -> None:
    assert set(hardware_names()) >= {"a100", "h20", "h100", "h200", "rtx-4090"}
    assert "a100-opt-13b-distserve" in model_names()
    files = {p.stem for p in (data_dir() / "hardware").glob("*.json")}
    assert files == {*hardware_names(), *model_names()}
    for name in model_names():
        assert load_model(name).source
    for name in hardware_names():
        gpu = load_hardware(name)
        figures = [gpu.bandwidth, gpu.peak, gpu.link, gpu.memory, *([gpu.launch] if gpu.launch else [])]
        assert all(figure.source for figure in figures)
        assert 5e11 < gpu.bandwidth.value < 1e13
        assert 1e14 < gpu.peak.value < 2e15
        assert gpu.link.value < gpu.bandwidth.value


def _leaf(record: dict[str, Any], *path: str) -> float:
    found: Any = record
    for key in path:
        found = found[key]
    return float(found)


@pytest.mark.parametrize(
    ("name", "figure", "path"),
    [
        ("h100", "bandwidth", ("ceilings", "read_bytes_per_s")),
        ("h100", "peak", ("ceilings", "matmul_flops_per_s", "bfloat16")),
        ("h100", "launch", ("modes", "eager", "decode_1")),
        ("h200", "bandwidth", ("ceilings", "read_gb_s")),
    ],
)
def test_measured_figures_are_those_of_the_records(name: str, figure: str, path: tuple[str, ...]) -> None:
    found = getattr(load_hardware(name), figure)
    assert found.measured
    file = found.source.split(",")[0].split(":")[0]
    record = json.loads((data_dir() / "recorded" / Path(file).name).read_text())
    unit = {"read_gb_s": 1e9, "decode_1": 1e-3}.get(path[-1], 1)
    assert found.value == pytest.approx(_leaf(record, *path) * unit, rel=0.002)


def test_the_prior_of_a_device_and_launch_overhead() -> None:
    h100 = load_hardware("h100")
    graphs, eager = h100.prior(QWEN), h100.prior(QWEN, cuda_graphs=False)
    assert vars(eager) == {**vars(graphs), "host_s": 0.0488}
    # Recorded on an H100: 5.76 ms a decode step with graphs, 48.8 without; the prior is a lower bound of the first.
    assert 4.5e-3 < graphs.decode_seconds(1, 512) < 5.8e-3
    assert eager.decode_seconds(1, 512) == 0.0488
    with pytest.raises(ValueError, match="a100: nobody measured its launch overhead"):
        load_hardware("a100").prior(QWEN, cuda_graphs=False)


def test_the_models_need_no_torch() -> None:
    modules = ("calibrate", "derived", "files", "fitting", "grid", "hardware", "iteration", "nanopd", "cli")
    imports = "; ".join(f"import nanopd_lab.cost.{name}" for name in modules)
    code = f"import sys; {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown hardware 'b200'; choose one of .*h100, h20, h200, rtx-4090"
    ):
        load_hardware("b200")
    with pytest.raises(
        ValueError, match=r"unknown cost model 'h100'; choose one of .*a100-opt-13b-distserve"
    ):
        load_model("h100")
    with pytest.raises(ValueError, match="there is no file"):
        load_hardware(str(tmp_path / "mine.json"))
    mine = tmp_path / "mine.json"
    record = json.loads((data_dir() / "hardware" / "h200.json").read_text())
    mine.write_text(json.dumps(record))
    assert load_hardware(str(mine)).name == "mine"
    mine.write_text(json.dumps({**record, "link_bytes_per_s": {"guess": {"value": 1}}}))
    with pytest.raises(ValueError, match="needs a 'measured' or a 'datasheet' entry"):
        load_hardware(str(mine))
    mine.write_text(json.dumps({**record, "schema": "nanopd-lab/hardware/9"}))
    with pytest.raises(ValueError, match=r"hardware/9.*hardware/1"):
        load_hardware(str(mine))
