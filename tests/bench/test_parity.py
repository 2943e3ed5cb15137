"""`nanopd-lab parity`: it serves and simulates the same requests, and compares what it says it does."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nanopd_lab.bench import parity
from nanopd_lab.bench.ranking import above, agreement
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


def test_the_command_writes_both_sides_ranks_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = IterationModel(1e-3, 1e-3, 1e-5, 0.0, 0.0, 0.0)
    CostModel("tiny", "here", model, fit={"block_bytes": 2048}).save(tmp_path / "model.json")
    rounds, ranking = tmp_path / "rounds.jsonl", tmp_path / "ranking.json"
    arguments = [
        "parity", "--model", "random:tiny", "--cost-model", str(tmp_path / "model.json"), "--policies", "1p1d",
        "adaptive", "--request-rates", "20", "--num-prompts", "6", "--input-median", "20", "--output-median", "6",
        "--kv-blocks", "100", "--goodput", "ttft:5000", "--result-filename", str(tmp_path / "parity.json"),
        "--rounds-filename", str(rounds), "--ranking-filename", str(ranking), "--seeds", "3",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "p90_e2el_ms" in capsys.readouterr().out
    first = rounds.read_text()
    assert main([*arguments, "4"]) == 0
    assert rounds.read_text().startswith(first)
    assert len(rounds.read_text().splitlines()) == 4
    record, other = json.loads((tmp_path / "parity.json").read_text())
    assert (record["schema"], record["policy"], other["policy"]) == (parity.SCHEMA, "1p1d", "adaptive")
    assert record["request_rate"] == 20
    assert [each["seed"] for each in record["rounds"]] == [3, 4]
    for name, error in record["error"].items():
        assert record["real"][name] > 0
        if name != parity.ATTAINMENT:
            assert error == pytest.approx(record["simulated"][name] / record["real"][name] - 1)
    # The simulated side is the cost model's: a step of that model takes 1.7 to 2 ms, whatever the machine.
    assert 1.5 < record["simulated"]["p50_tpot_ms"] < 4
    found = json.loads(ranking.read_text(), parse_constant=pytest.fail)
    assert found["schema"] == parity.RANKING_SCHEMA
    assert [each["figure"] for each in found["rankings"]] == list(parity.RANKED)
    assert all(
        each["seeds"] == 2 and set(each["ranks"]) == {"1p1d", "adaptive"} for each in found["rankings"]
    )
    assert main([*arguments, "--num-prompts", "7"]) == 2
    assert "rounds of other settings" in capsys.readouterr().err


def test_at_its_own_pace_the_models_speed_does_not_matter(tmp_path: Path) -> None:
    """A model that is four times as slow says the same of a round: its pace by it is a quarter."""
    for name, factor in (("model", 1.0), ("slow", 4.0)):
        model = IterationModel(1e-3, 1e-3, 1e-5, 0.0, 0.0, 0.0).scaled(factor)
        CostModel("tiny", "here", model, fit={"block_bytes": 2048}).save(tmp_path / f"{name}.json")
        result, rounds = tmp_path / f"parity-{name}.json", tmp_path / f"{name}.jsonl"
        arguments = [
            "parity", "--model", "random:tiny", "--cost-model", str(tmp_path / f"{name}.json"), "--policies",
            "collocated", "--request-rates", "20", "--num-prompts", "12", "--input-median", "20", "--output-median",
            "12", "--kv-blocks", "100", "--seeds", "0", "--rounds-filename", str(rounds), "--result-filename",
            str(result), "--own-pace",
        ]  # fmt: skip
        assert main(arguments) == 0
        (record,) = json.loads(result.read_text())
        (each,) = record["rounds"]
        # By the model 2 ms a decode step, and a little for each of a few that share it.
        at_pace_one = each["simulated"]["p50_tpot_ms"] / (factor * each["pace"]["reading"])
        assert at_pace_one == pytest.approx(2.0, rel=0.1)
        kept = rounds.read_text()
        assert main(arguments[:-1]) == 2  # rounds of other settings
        assert main(arguments) == 0
        assert rounds.read_text() == kept
        assert json.loads(result.read_text())[0]["rounds"] == record["rounds"]


def test_another_model_has_no_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.json"
    arguments = [
        "parity",
        "--cost-model",
        str(path),
        "--own-pace",
        "--simulate-with",
        str(tmp_path / "b.json"),
    ]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "--own-pace" in said
    assert "--simulate-with" in said
    assert not path.exists()


def test_a_cost_model_that_is_not_there_is_measured(tmp_path: Path) -> None:
    """By both processes, and by one alone; and another one, with which rounds that were served are simulated anew."""
    path, rounds, again = tmp_path / "cost-model.json", tmp_path / "rounds.jsonl", tmp_path / "again.json"
    arguments = [
        "parity", "--model", "random:tiny", "--cost-model", str(path), "--policies", "collocated", "--request-rates",
        "20", "--num-prompts", "2", "--seeds", "0", "--input-median", "20", "--output-median", "3", "--kv-blocks",
        "100", "--rounds-filename", str(rounds),
    ]  # fmt: skip
    assert main(arguments) == 0
    measured = CostModel.load(path)
    assert measured.fit["block_bytes"] > 0
    assert measured.company is not None
    assert measured.company.processes == 2
    served = rounds.read_text()
    assert main([*arguments, "--simulate-with", str(again)]) == 0
    assert rounds.read_text() == served
    assert CostModel.load(path) == measured != CostModel.load(again)
    assert {each.name for each in tmp_path.iterdir()} == {path.name, rounds.name, again.name}


def test_two_are_told_apart_if_all_seeds_say_so() -> None:
    assert above([1.0, 2.0, 3.0], [0.9, 1.9, 2.5]) == 1
    assert above([1.0, 2.0, 3.0], [1.1, 2.1, 3.5]) == -1
    assert above([1.0, 2.0, 3.0], [0.5, 2.5, 2.9]) == 0
    assert above([1.0, 1.0], [1.0, 1.0]) == 0


@given(st.lists(st.integers(0, 4), min_size=2, max_size=7), st.data())
def test_agreement_is_scipys(first: list[int], data: st.DataObject) -> None:
    """Of one seed, so that all that differ are told apart."""
    second = data.draw(st.lists(st.integers(0, 4), min_size=len(first), max_size=len(first)))
    sides = [{f"p{i}": [float(value)] for i, value in enumerate(each)} for each in (first, second)]
    found = agreement(*sides)
    pairs = list(itertools.combinations(range(len(first)), 2))
    signs = [[np.sign(each[i] - each[j]) for i, j in pairs] for each in (first, second)]
    assert found.told_apart == sum(a * b != 0 for a, b in zip(*signs, strict=True))
    assert len(found.contradictions) == sum(a * b < 0 for a, b in zip(*signs, strict=True))
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert math.isnan(found.kendall)
        assert math.isnan(found.spearman)
        return
    assert found.kendall == pytest.approx(stats.kendalltau(first, second).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(first, second).statistic)
    assert [ranks[0] for ranks in found.ranks.values()] == list(stats.rankdata(first))


def test_rankings_of_different_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="the same two policies or more"):
        agreement({"a": [1.0], "b": [2.0]}, {"a": [1.0], "c": [2.0]})
