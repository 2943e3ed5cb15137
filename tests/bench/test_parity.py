"""`nanopd-lab parity`: it serves and simulates the same requests, and compares what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanopd_lab.bench import parity
from nanopd_lab.cli import main
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cost.files import CostModel
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.sim import SimRequest


def test_serve_keeps_to_the_schedule() -> None:
    requests = [SimRequest("b", 0.3, 30, 5), SimRequest("a", 0.0, 8, 3), SimRequest("c", 0.3, 17, 1)]
    config = ClusterConfig(
        "random:tiny", workers=2, policy="1p1d", launcher="process", engine={"kv_cache_memory_bytes": 1 << 20}
    )
    with Cluster(config) as cluster:
        records = parity.serve(cluster, requests)
        with pytest.raises(ValueError, match="max_model_len"):
            parity.serve(cluster, [SimRequest("d", 0.0, 10**6, 5)])
    assert [(record.request_id, record.output_tokens, record.ok) for record in records] == [
        ("a", 3, True), ("b", 5, True), ("c", 1, True),
    ]  # fmt: skip
    for record in records:
        assert record.scheduled is not None
        assert record.first_token is not None
        assert record.finished is not None
        assert record.arrival <= record.scheduled < record.first_token <= record.finished
        assert record.path is not None
        assert not record.path.problems()
    assert [record.path.transferred_tokens > 0 for record in records if record.path] == [True, True, False]


def test_the_command_writes_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = IterationModel(1e-3, 1e-3, 1e-5, 0.0, 0.0, 0.0)
    CostModel("tiny", "here", model, fit={"block_bytes": 2048}).save(tmp_path / "model.json")
    arguments = [
        "parity", "--model", "random:tiny", "--cost-model", str(tmp_path / "model.json"), "--policies", "1p1d",
        "--request-rates", "20", "--num-prompts", "6", "--seeds", "3", "--input-median", "20", "--output-median", "6",
        "--kv-blocks", "100", "--result-filename", str(tmp_path / "parity.json"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "p90_e2el_ms" in capsys.readouterr().out
    (record,) = json.loads((tmp_path / "parity.json").read_text())
    assert record["schema"] == parity.SCHEMA
    assert record["policy"] == "1p1d"
    assert record["request_rate"] == 20
    for name, error in record["error"].items():
        assert record["real"][name] > 0
        assert error == pytest.approx(record["simulated"][name] / record["real"][name] - 1)
    # The simulated side is the cost model's: a step of that model takes 1.7 to 2 ms, whatever the machine.
    assert 1.5 < record["simulated"]["p50_tpot_ms"] < 4
