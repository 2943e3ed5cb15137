"""A cost model corrected by steps in service, as `parity --service-rate` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nanopd_lab.cli import main
from nanopd_lab.cost.files import CostModel
from nanopd_lab.cost.iteration import IterationModel


def test_a_model_is_corrected_before_its_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plain = tmp_path / "cost-model.json", tmp_path / "plain.json"
    arguments = [
        "parity", "--model", "random:tiny", "--policies", "1p1d", "--request-rates", "20", "--num-prompts", "2",
        "--seeds", "0", "--input-median", "20", "--output-median", "5", "--kv-blocks", "100",
    ]  # fmt: skip
    served_first = [*arguments, "--cost-model", str(path), "--service-rate", "30"]
    assert main(served_first) == 0
    cost = CostModel.load(path)
    found = cost.fit["in_service"]
    assert found["policies"] == ["collocated", "1p1d"]
    assert found["num_prompts"] == 2
    assert found["reading"] > 0
    assert found["computing"] > 0
    assert main(served_first) == 0, "it is there by now, and was corrected"
    assert CostModel.load(path) == cost
    replace(cost, fit={"block_bytes": cost.fit["block_bytes"]}).save(plain)
    assert main([*arguments, "--cost-model", str(plain), "--service-rate", "30"]) == 2
    assert "not in service" in capsys.readouterr().err
    assert main([*arguments, "--cost-model", str(path), "--service-rate", "20"]) == 2
    assert "--service-rate 20 is one of --request-rates" in capsys.readouterr().err


def test_steps_that_are_launched_ahead_show_no_pace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cost-model.json"
    fit = {"block_bytes": 8192, "block_size": 16, "ahead": True}
    CostModel(
        "random:tiny", "a test", IterationModel(0.004, 0.0, 0.0005, 0.0, 1e-6, 0.0), None, None, fit
    ).save(path)
    arguments = ["parity", "--model", "random:tiny", "--policies", "1p1d", "--request-rates", "20"]
    assert main([*arguments, "--cost-model", str(path), "--own-pace"]) == 2
    assert (
        "--own-pace goes by steps' times, which say little where steps are launched ahead"
        in capsys.readouterr().err
    )
