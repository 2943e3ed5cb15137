"""Sweeps: what is there is not measured again, intervals cover, and the search finds where a queue breaks."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.bench.capacity import find_capacity
from nanopd_lab.bench.report import Setting, serving_result
from nanopd_lab.bench.sweep import SUMMARY_SCHEMA, Point, Results, interval, points_of, rows_of, sweep, table
from nanopd_lab.bench.workload import Fixed, random_workload
from nanopd_lab.cli import main
from nanopd_lab.router import Slo, create_policy
from nanopd_lab.sim import ConstantTime, Simulator
from nanopd_lab.sim.arrivals import Arrivals

SERVICE_S = 0.1
SLO = Slo(ttft_s=0.5)


def measure(point: Point, count: int = 50) -> dict[str, Any]:
    """One worker, a tenth of a second a request, nothing else: M/D/1."""
    workload = random_workload(count, Arrivals(point.rate), (Fixed(1), Fixed(1)), point.seed)
    found = Simulator(
        *create_policy(point.policy, 1), ConstantTime(SERVICE_S), workload.requests, one_by_one()
    )
    return serving_result(
        found.run().records, workload, Setting("queue", 1, point.policy, modelled=True), SLO
    )


def one_by_one() -> Any:
    from nanopd_lab.sim import SimConfig

    return SimConfig(max_num_seqs=1)


POINTS = points_of(["collocated", "round-robin"], [2.0, 6.0], [0, 1, 2])


@pytest.mark.parametrize(
    "content", ['{"mine": 1}', "my notes", '{"schema": "other/1"}', '{"mine": 1}\n{"sch']
)
def test_another_file_is_refused_and_left_as_it_is(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json"):
        Results(path, {})
    assert path.read_text() == content


def test_a_sweep_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    asked: list[Point] = []

    def measured(point: Point) -> dict[str, Any]:
        asked.append(point)
        if len(asked) == 8:
            raise KeyboardInterrupt
        return measure(point)

    with pytest.raises(KeyboardInterrupt):
        list(sweep(POINTS, measured, Results(path, {"workers": 1})))
    with path.open("a") as file:
        file.write('{"schema": "nanopd')  # an outage in the middle of a line
    results = Results(path, {"workers": 1})
    assert list(results.by_point) == POINTS[:7]
    assert len(list(sweep(POINTS, measured, results))) == 12
    assert asked == [*POINTS[:8], *POINTS[7:]]
    whole = Results(path, {"workers": 1})
    assert list(whole.by_point) == POINTS
    assert [row.rate for row in rows_of(whole.by_point.values())] == [2, 6, 2, 6]


def test_a_partial_result_is_kept_and_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"

    def cut_short(point: Point) -> dict[str, Any]:
        return {**measure(point), "partial": point.seed == 1}

    assert [each["partial"] for each in sweep(POINTS, cut_short, Results(path, {}))] == [False, True]
    assert len(path.read_text().splitlines()) == 2
    assert list(Results(path, {}).by_point) == POINTS[:1]


def test_a_file_of_other_settings_or_of_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    list(sweep(POINTS[:1], measure, Results(path, {"workers": 1, "model": "a"})))
    with pytest.raises(ValueError, match=r"sweep\.jsonl, line 1 .* workers 1, now 2; give another file"):
        Results(path, {"workers": 2, "model": "a"})
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"sweep\.jsonl, line 1: no result of a sweep"):
        Results(path, {})


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    """Of 20 normal values, which is many for a bootstrap; of three they are narrower."""
    rng = random.Random(0)
    held = {3: 0, 20: 0}
    for _ in range(300):
        for count in held:
            found = interval([rng.gauss(5.0, 2.0) for _ in range(count)])
            assert found.low is not None
            assert found.high is not None
            held[count] += found.low <= 5.0 <= found.high
    assert 0.88 * 300 < held[20] < 0.99 * 300
    assert 0.5 * 300 < held[3] < held[20]
    assert interval([4.0]) == (4.0, None, None, 1)
    assert interval([4.0, 4.0])[:3] == (4.0, 4.0, 4.0)


def test_rows_have_the_means_over_seeds() -> None:
    results = [measure(point) for point in POINTS]
    rows = {(row.policy, row.rate): row for row in rows_of(results)}
    group = [each for each in results if each["pd"]["policy"] == "collocated" and each["request_rate"] == 6]
    for name in ("mean_ttft_ms", "output_throughput", "request_goodput"):
        mean = statistics.fmean(each[name] for each in group)
        assert rows["collocated", 6.0].metrics[name].mean == pytest.approx(mean)
    assert rows["collocated", 6.0].metrics["attainment"].seeds == 3
    text = table(list(rows.values()))
    assert "in time" in text
    assert "bootstrap over 3 seeds" in text
    json.loads(json.dumps([row.as_json() for row in rows.values()]), parse_constant=pytest.fail)


@given(st.floats(0.01, 1e4), st.floats(0.01, 1e4), st.floats(0.01, 0.5), st.floats(1.01, 2.0))
@settings(deadline=None, max_examples=100)
def test_the_search_brackets_where_a_falling_share_crosses_the_target(
    limit: float, start: float, tolerance: float, step: float
) -> None:
    asked: list[float] = []

    def share(rate: float) -> float:
        asked.append(rate)
        return 1.0 if rate <= limit else 0.5

    found = find_capacity(share, 0.9, start, tolerance, step)
    assert found.rate <= limit < found.above <= found.rate * (1 + tolerance) * (1 + 1e-12)
    assert len(asked) == len(set(asked))
    assert found.attainment == 1.0


def test_a_search_that_has_no_end_says_so() -> None:
    always, never = find_capacity(lambda rate: 1.0, 0.9), find_capacity(lambda rate: 0.0, 0.9)
    assert always.above == math.inf
    assert never.rate == 0
    with pytest.raises(ValueError, match=r"target 1\.5"):
        find_capacity(lambda rate: 1.0, 1.5)
    with pytest.raises(ValueError, match="positive tolerance"):
        find_capacity(lambda rate: 1.0, 0.9, tolerance=0.0)
    with pytest.raises(ValueError, match=r"steps of 3"):
        find_capacity(lambda rate: 1.0, 0.9, step=3.0)


def test_a_good_guess_saves_asking() -> None:
    asked: list[float] = []

    def share(rate: float) -> float:
        asked.append(rate)
        return 1.0 if rate <= 10.4 else 0.5

    find_capacity(share, 0.9, 10.0, 0.02, step=1.07)
    assert len(asked) <= 4


def test_the_search_finds_the_capacity_of_a_queue_that_theory_knows() -> None:
    """M/D/1 with D = 0.1 s: the share that waits no more than w is known (Erlang, 1909), and 90 % within 0.5 s of
    arrival, so a wait of 0.4 s, are reached up to the rate at which it is 0.9."""

    def within(rate: float, wait_s: float) -> float:
        load = rate * SERVICE_S
        return (1 - load) * sum(
            (-rate * (wait_s - k * SERVICE_S)) ** k
            / math.factorial(k)
            * math.exp(rate * (wait_s - k * SERVICE_S))
            for k in range(int(wait_s / SERVICE_S + 1e-9) + 1)
        )

    low, high = 1.0, 9.9
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, 0.4 - 1e-9) >= 0.9 else (low, middle)

    def attainment(rate: float) -> float:
        shares = [
            measure(Point("collocated", rate, seed), 3000)["pd"]["slo"]["attainment"] for seed in range(2)
        ]
        return statistics.fmean(shares)

    found = find_capacity(attainment, 0.9, 4.0, 0.03)
    assert found.rate == pytest.approx(low, rel=0.05)


def test_the_command_sweeps_searches_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, brief = tmp_path / "sweep.jsonl", tmp_path / "sweep.json"
    arguments = [
        "sweep", "--simulate", "--workers", "2", "--policies", "collocated", "1p1d", "--request-rates", "5",
        "--seeds", "0", "1", "--num-prompts", "20", "--random-input-len", "100", "--random-output-len", "10",
        "--goodput", "ttft:60", "--search", "0.9", "--search-start", "60", "--search-tolerance", "0.5",
        "--min-duration", "1", "--result-filename", str(path), "--summary-filename", str(brief),
    ]  # fmt: skip
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "1p1d: 90% in time up to" in out
    lines = path.read_text().splitlines()
    record = json.loads(brief.read_text(), parse_constant=pytest.fail)
    assert record["schema"] == SUMMARY_SCHEMA
    assert record["modelled"]
    assert not record["partial"]
    for policy in ("collocated", "1p1d"):
        (found,) = record["search"][policy]
        assert found["attainment"] >= 0.9
        assert found["rate"] < found["above"] <= 1.5 * found["rate"]
    at_five = [row for row in record["rows"] if row["request_rate"] == 5]
    assert [row["metrics"]["attainment"]["seeds"] for row in at_five] == [2, 2]
    # As many as keep coming for a second.
    assert {json.loads(line)["num_prompts"] for line in lines} > {20, 60}
    assert main(arguments) == 0
    assert path.read_text().splitlines() == lines
    assert main([*arguments, "--workers", "3"]) == 2
    assert "needs 1 + 1 workers" in capsys.readouterr().err
    assert main([*arguments, "--random-input-len", "99"]) == 2
    assert "random_input_len 100, now 99" in capsys.readouterr().err


def test_policies_that_estimate_and_prompts_that_share_are_simulated_as_by_simulate(tmp_path: Path) -> None:
    flags = [
        "--simulate", "--workers", "2", "--seeds", "4", "--request-rates", "5", "--policies", "nanopd", "threshold",
    ]  # fmt: skip
    same = [
        "--dataset-name", "prefix_repetition", "--num-prompts", "30", "--prefix-repetition-num-prefixes", "2",
        "--goodput", "ttft:50",
    ]  # fmt: skip
    path, single = tmp_path / "sweep.jsonl", tmp_path / "one.json"
    assert main(["sweep", *flags, *same, "--result-filename", str(path)]) == 0
    alone = ["--workers", "2", "--request-rate", "5", "--seed", "4", "--result-filename", str(single)]
    for line, policy in zip(path.read_text().splitlines(), ("nanopd", "threshold"), strict=True):
        assert main(["simulate", *alone, *same, "--policy", policy]) == 0
        swept, one = json.loads(line), json.loads(single.read_text())
        assert swept["pd"].pop("sweep")["dataset_name"] == "prefix_repetition"
        for record in (swept, one):
            del record["date"], record["provenance"]
        assert swept == one
        assert (
            one["pd"]["cached_tokens"] >= (30 - 2 * 2) * 256
        )  # each worker computes each prefix once, at most
    # As of one cluster: what cannot be is found before anything is measured.
    assert main(["sweep", *flags, "--policies", "round-robin", "9p9d"]) == 2


def test_the_command_sweeps_real_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.jsonl"
    arguments = [
        "sweep", "--model", "random:tiny", "--launcher", "inline", "--policies", "1p1d", "collocated",
        "--request-rates", "200", "--seeds", "0", "1", "--num-prompts", "6", "--random-input-len", "20",
        "--random-output-len", "4", "--kv-cache-memory-bytes", str(1 << 20), "--result-filename", str(path),
        "--num-warmups", "0", "--disable-tqdm",
    ]  # fmt: skip
    assert main(arguments) == 0
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["pd"]["policy"] for record in records] == ["1p1d", "1p1d", "collocated", "collocated"]
    assert [record["pd"]["disaggregated"] for record in records] == [6, 6, 0, 0]
    assert all(record["completed"] == 6 and record["backend"] == "nanopd-lab" for record in records)
    assert main(["sweep", "--search"]) == 2
    assert "--search needs objectives" in capsys.readouterr().err
    assert main(["sweep"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--request-rates", "1", "--min-duration", "-1"], "min-duration is -1 s"),
        (["--request-rates", "1", "--min-duration", "nan"], "min-duration is nan s"),
        (["--request-rates", "1", "-2"], "rate is -2 requests/s"),
        (["--request-rates", "1", "--search", "2", "--goodput", "ttft:500"], "attainment target 2.0"),
        (["--search", "--search-tolerance", "0", "--goodput", "ttft:500"], "tolerance of 0.0"),
        (["--request-rates", "1", "--random-input-len", "0"], "a length of 0 tokens"),
        (["--request-rates", "1", "--num-prompts", "0"], "num-prompts is 0"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_measured(
    flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.jsonl"
    common = ["sweep", "--simulate", "--policies", "collocated", "--num-prompts", "5"]
    assert main([*common, "--result-filename", str(path), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not path.exists()


def test_a_file_that_is_too_short_for_the_duration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is told to be lowered is what asks for so many, and as low as told it does."""
    path = tmp_path / "talk.json"
    turns = [
        {"value": "What is the highest mountain on Earth?"},
        {"value": "That is Mount Everest, of course."},
    ]
    path.write_text(json.dumps([{"conversations": turns}] * 20))
    common = [
        "sweep", "--simulate", "--policies", "collocated", "--seeds", "0", "--goodput", "ttft:500", "--search", "0.9",
        "--search-start", "3", "--dataset-name", "sharegpt", "--dataset-path", str(path),
    ]  # fmt: skip
    asked = r"talk\.json has 20 conversations of fit length, and {} are asked for"
    assert main([*common, "--num-prompts", "8"]) == 2
    told = capsys.readouterr().err
    found = re.search(
        asked.format(90)
        + ", as requests keep coming for min-duration = 30 s at 3 a second; lower min-duration to "
        r"([\d.]+) s or less, or give a longer file",
        told,
    )
    assert found, told
    rate = ["--request-rates", "3"]
    del common[common.index("--search") : common.index("--search") + 4]
    assert main([*common, "--num-prompts", "8", *rate, "--min-duration", found[1]]) == 0
    assert main([*common, "--num-prompts", "21", *rate, "--min-duration", "30"]) == 2
    assert re.search(" s or less and num-prompts to 20, or give", capsys.readouterr().err)
    assert main([*common, "--num-prompts", "21", *rate]) == 2
    assert re.search(asked.format(21) + "; lower num-prompts", capsys.readouterr().err)
