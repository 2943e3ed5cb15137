"""The evaluation against figures worked out another way, and what it says of workloads whose truth is known."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanopd_lab.cli import main
from nanopd_lab.router.predictor import BayesianLengths, BucketedMean, OverallQuantiles
from nanopd_lab.router.predictor.evaluation import (
    LEVELS,
    PREDICTORS,
    Learning,
    Replay,
    evaluate,
    replay,
    summary,
)
from nanopd_lab.router.predictor.synthetic import KnownLengths, workload
from nanopd_lab.sim.workload import SimRequest

TRACE = Path("shared/traces/azure_code_2023.csv")  # beside the repository, not in it
AZURE = next((up / TRACE for up in Path(__file__).parents if (up / TRACE).exists()), TRACE)


class Told:
    """Remembers what it is told, and how much it knew at each question."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, bool]] = []
        self.known: list[int] = []
        self._inner = BucketedMean()

    def predict(self, prompt_tokens: int, max_tokens: int) -> Any:
        self.known.append(len(self.told))
        return self._inner.predict(prompt_tokens, max_tokens)

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        self.told.append((prompt_tokens, output_tokens, censored))


REQUESTS = [SimRequest(f"r{k}", float(k), 10 + k, output) for k, output in enumerate((30, 2, 100, 5))]


def test_it_is_told_after_it_is_asked() -> None:
    predictor = Told()
    replay(predictor, REQUESTS, 50)
    assert predictor.known == [0, 1, 2, 3]
    assert predictor.told == [(10, 30, False), (11, 2, False), (12, 50, True), (13, 5, False)]


def test_what_is_delayed_is_told_when_it_ends() -> None:
    """Ends are at 0 + 0.5 + 3.0, 1 + 0.5 + 0.2 and so on; the last two end after the last question."""
    predictor = Told()
    replay(predictor, REQUESTS, 50, Learning(prefill_s=0.5, token_s=0.1))
    assert predictor.known == [0, 0, 1, 1]
    assert predictor.told == [(11, 2, False)]


def test_what_is_running_is_told_now_and_then() -> None:
    class Surveyed(Told):
        surveys: list[list[tuple[int, int]]] = []  # noqa: RUF012

        def survey(self, running: list[tuple[int, int]]) -> None:
            self.surveys.append(sorted(running))

    predictor = Surveyed()
    replay(predictor, REQUESTS, 50, Learning(prefill_s=0.5, token_s=0.1, survey_s=1.5))
    # At 0 s nothing runs; at 2 s the first has 15 tokens, the second has ended.
    assert predictor.surveys == [[], [(10, 15)]]


def test_a_survey_helps_while_only_the_short_ones_have_ended() -> None:
    """50 requests a second of 5 s each: the first 500."""
    loss, within = {}, {}
    for often in (math.inf, 1.0):
        requests, _ = workload("alike", 500, rate=50.0, seed=1)
        done = replay(BayesianLengths(), requests, 4096, Learning(0.2, 0.03, survey_s=often)).figures()
        loss[often], within[often] = done["pinball"].mean(), done["within_90"].mean()
    assert loss[1.0] < 0.9 * loss[math.inf]
    assert within[math.inf] + 0.1 < within[1.0]


def test_what_is_cancelled_is_longer_than_it_is_said_to_be() -> None:
    requests, _ = workload("alike", 400)
    predictor = Told()
    done = replay(predictor, requests, 4096, Learning(cancelled=True))
    assert 0.2 < np.mean([cut for _, _, cut in predictor.told]) < 0.8
    for (_, said, cut), request in zip(predictor.told, requests, strict=True):
        assert said < request.output_tokens if cut else said == request.output_tokens
    assert done.lengths.tolist() == [min(4096, request.output_tokens) for request in requests]


def test_figures_are_those_worked_out_by_hand() -> None:
    """One forecast whose quantiles are 1, 2, 4, 8, 16, 32, 64, and the lengths 8, 10 and 100."""
    quantiles = np.array([[1, 2, 4, 8, 16, 32, 64]] * 3, dtype=float)
    found = Replay(quantiles, np.array([12.0, 12.0, 12.0]), np.array([8.0, 10.0, 100.0])).figures()
    assert found["mae_of_median"].tolist() == [0, 2, 92]
    assert found["mae_of_mean"].tolist() == [4, 2, 88]
    assert found["error_of_mean"].tolist() == [4, 2, -88]
    assert found["pinball_90"] == pytest.approx([0.1 * 24, 0.1 * 22, 0.9 * 68])
    assert found["pinball_05"] == pytest.approx([0.05 * 7, 0.05 * 9, 0.05 * 99])
    assert found["within_50"].tolist() == [1, 1, 0]
    assert found["within_90"].tolist() == [1, 1, 0]
    assert found["pinball"][0] == pytest.approx(
        np.mean([found[f"pinball_{100 * p:02.0f}"][0] for p in LEVELS])
    )
    on_an_end = Replay(quantiles[:1], np.array([12.0]), np.array([16.0])).figures()
    assert (on_an_end["within_50"][0], on_an_end["strictly_within_50"][0]) == (1, 0)


def test_intervals_are_as_wide_as_theory_has_them() -> None:
    rng = np.random.default_rng(1)
    loss = rng.exponential(1.0, 5000)
    row = dict.fromkeys(("pinball", "mae_of_median", "within_50", "within_90"), loss)
    mean, low, high = summary({"one": row})["one"]["pinball"]
    assert mean == pytest.approx(loss.mean())
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(5000), rel=0.15)
    twice = {key: 2 * values for key, values in row.items()}
    assert summary({"one": row, "two": twice})["two"]["excess"]["pinball"] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("kind", ["alike", "buckets", "drift"])
def test_the_truth_is_never_beaten_and_intervals_hold(kind: str) -> None:
    requests, logs = workload(kind, 2500, seed=3)
    predictors = {"bayesian": BayesianLengths, "overall": OverallQuantiles, "mean": BucketedMean}
    found = evaluate(requests, 4096, 0.3, (0.2, 0.03), predictors, partial(KnownLengths, logs))
    rows = found["scenarios"]["immediate"]
    truth = rows["the truth"]
    assert all(row["pinball"][0] >= 0.995 * truth["pinball"][0] for row in rows.values())
    for share in (50, 90):
        assert truth[f"within_{share}"][0] == pytest.approx(share / 100, abs=0.03)
        assert rows["bayesian"][f"within_{share}"][0] == pytest.approx(share / 100, abs=0.04)
    close = {"alike": 0.01, "buckets": 0.04, "drift": 0.08}[kind]
    assert truth["excess"]["pinball"][0] > -close
    assert rows["mean"]["excess"]["pinball"][0] > 0.3
    if kind == "buckets":
        assert rows["overall"]["excess"]["pinball"][1] > 0.1
    cancelled = found["scenarios"]["cancelled"]
    assert cancelled["overall"]["excess"]["pinball"][1] > 0.03
    assert "the truth" not in found["scenarios"]["starts, delayed"]


def test_bad_input_is_refused() -> None:
    requests, _ = workload("alike", 120)
    with pytest.raises(
        ValueError, match="84 requests are left to judge behind 36; there must be 100: take a longer"
    ):
        evaluate(requests)
    with pytest.raises(ValueError, match=r"skip is 1\.5"):
        evaluate(requests, skip=1.5)
    with pytest.raises(ValueError, match="unknown synthetic workload 'x'; choose one of alike"):
        workload("x", 10)


def test_the_command_writes_a_record_without_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "some.csv"
    requests, _ = workload("buckets", 600)
    lines = [f"{each.arrival},{each.prompt_tokens},{each.output_tokens}" for each in requests]
    trace.write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *lines]) + "\n")
    out = tmp_path / "result.json"
    assert main(["predictor", "--trace", str(trace), "--result-filename", str(out)]) == 0
    text = out.read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    assert record["schema"] == "nanopd-lab/length-forecasts/1"
    assert record["requests"]["trace"] == "some.csv"
    assert len(record["requests"]["sha256"]) == 64
    assert record["judged"] == 420
    assert set(record["scenarios"]) == {
        "immediate",
        "delayed",
        "cancelled",
        "starts, immediate",
        "starts, delayed",
    }
    row = record["scenarios"]["delayed"]["bayesian"]
    assert len(row["over_time"]["pinball"]) == 10
    assert row["pinball"][1] < row["pinball"][0] < row["pinball"][2]
    printed = capsys.readouterr().out
    assert "420 of 600 requests judged" in printed
    assert "bucketed mean (nanoPD)" in printed


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predictor", "--trace", str(tmp_path / "none.csv")]) == 2
    assert main(["predictor", "--synthetic", "alike", "--num-prompts", "0"]) == 2
    assert main(["predictor", "--synthetic", "alike", "--max-tokens", "0"]) == 2
    said = capsys.readouterr().err
    assert "none.csv" in said
    assert "num-prompts is 0" in said
    assert "max-tokens must be at least 1" in said


@pytest.mark.slow
@pytest.mark.skipif(not AZURE.exists(), reason=f"there is no {TRACE} beside the repository")
def test_on_the_azure_trace_it_is_level_with_plain_quantiles_and_ahead_of_buckets() -> None:
    """Its lengths have little to do with the prompts', so that all quantiles are as good as can be there."""
    from nanopd_lab.sim.request_trace import read_trace

    predictors = {name: PREDICTORS[name] for name in ("bayesian", "overall quantiles", "bucketed quantiles")}
    found = evaluate(read_trace(AZURE), predictors=predictors)["scenarios"]
    assert abs(found["immediate"]["overall quantiles"]["excess"]["pinball"][0]) < 0.01
    assert found["immediate"]["bucketed quantiles"]["excess"]["pinball"][1] > 0
    assert found["cancelled"]["overall quantiles"]["excess"]["pinball"][1] > 0
    assert found["starts, immediate"]["overall quantiles"]["excess"]["pinball"][1] > 0
    for row in (found[way]["bayesian"] for way in found):
        for share in (50, 90):
            # Many lengths fall on an end of an interval: a right one holds between these two.
            assert row[f"strictly_within_{share}"][0] - 0.02 < share / 100 < row[f"within_{share}"][0] + 0.02
