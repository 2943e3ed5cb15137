"""The bench's record, its table and figure, and the command line, from the recorded run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nanopd_lab.bench import kernels
from nanopd_lab.kernels import cli
from nanopd_lab.kernels.decode_launches import RUNGS
from nanopd_lab.resources import data_dir
from nanopd_lab.viz.ladder import LABELS, ladder_figure

RECORDS = sorted((data_dir() / "recorded").glob("kernels-*.json"))


@pytest.fixture(params=RECORDS, ids=lambda path: path.stem)
def record(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text())


def test_there_is_a_recorded_run() -> None:
    assert RECORDS


def test_record_is_whole_and_consistent(record: dict) -> None:
    assert (record["kind"], record["schema"]) == ("kernels", kernels.SCHEMA)
    assert {"date", "commit", "command", "versions"} <= set(record["provenance"])
    assert record["provenance"]["commit"]
    assert [(row["batch"], row["context"]) for row in record["shapes"]] == list(kernels.TWELVE)
    for row in [*record["shapes"], record["ragged"]]:
        assert row["floor_us"] == pytest.approx(row["kv_bytes"] / record["ceilings"]["read_gb_s"] / 1e3)
        assert set(RUNGS) <= set(row["results"])
        for result in row["results"].values():
            assert result["fraction_of_roof"] == pytest.approx(row["floor_us"] / result["median_us"])
            assert 0 < result["p25_us"] <= result["median_us"] <= result["p75_us"]


def test_recorded_ladder_climbs(record: dict) -> None:
    means = [kernels.geometric_mean(record, rung) for rung in RUNGS]
    assert means == sorted(means, reverse=True)


def test_table_names_every_shape(record: dict) -> None:
    text = kernels.table(record)
    for batch, context in kernels.TWELVE:
        assert f"{batch} x {context} " in text
    assert "geometric means" in text


def test_figure_shows_the_roof_and_every_rung(record: dict) -> None:
    axes = ladder_figure(record).axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert all(LABELS[rung] in labels for rung in RUNGS)
    roof = record["ceilings"]["read_gb_s"]
    assert any(list(line.get_ydata()) == [roof, roof] for line in axes.lines)
    assert "recorded" in axes.get_title()


def test_plot_command(record: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "record.json"
    source.write_text(json.dumps(record))
    assert cli.main(["plot", str(source), "--out", str(tmp_path / "ladder.png")]) == 0
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    source.write_text("{}")
    assert cli.main(["plot", str(source)]) == 2
    assert "not a record" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_bench_without_a_gpu_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench"]) == 2
    assert "data/recorded" in capsys.readouterr().err
    assert cli.main(["bench", "--rungs", "fastest"]) == 2
    assert "choose from naive" in capsys.readouterr().err


def test_ragged_lengths_are_skewed_and_in_range() -> None:
    contexts = kernels.ragged_contexts()
    assert len(contexts) == 128
    assert max(contexts) == 32768
    assert min(contexts) >= 64
    assert sorted(contexts)[64] < sum(contexts) / 128  # a few long ones carry the mean


def test_plans_without_a_gpu_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert cli.main(["plans"]) == 2
    assert "torch sees none here" in capsys.readouterr().err
    assert cli.main(["plans", "--rounds", "1"]) == 2
    assert "--rounds: at least 3" in capsys.readouterr().err
