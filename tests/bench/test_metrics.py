"""A result's figures against vLLM's formulas, written down again from its source, and against queueing theory."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.bench.disaggregation import UNFINISHED, UNSENT, disaggregation
from nanopd_lab.bench.metrics import LoadRecord, Selection, Served, serving_metrics
from nanopd_lab.bench.report import SCHEMA, Setting, serving_result, summary
from nanopd_lab.bench.workload import Uniform, Workload, random_workload
from nanopd_lab.cli import main
from nanopd_lab.router import Slo, create_policy
from nanopd_lab.sim import Kill, LinearTime, LinkModel, SimConfig, SimRequest, Simulator
from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.sim.results import RequestRecord

# What `vllm bench serve` writes for a model that generates text (vllm/benchmarks/serve.py, read in November 2026).
HEAD = """
    date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency
    duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
    output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests rtfx
""".split()  # noqa: SIM905 - for people
DETAILS = """
    input_lens output_lens ttfts itls latencies start_times queue_times generated_texts errors
""".split()  # noqa: SIM905
RAMP = ["ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"]
OURS = {"schema", "partial", "pd", "provenance"}


def latency_keys(percentiles: tuple[str, ...]) -> set[str]:
    kinds = ("mean", "median", "std", *(f"p{each}" for each in percentiles))
    return {f"{kind}_{name}_ms" for kind in kinds for name in ("ttft", "tpot", "itl", "e2el")}


def loaded(seed: int, count: int = 40) -> list[LoadRecord]:
    """What a generator might have recorded, with failures, single tokens and late sends."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        arrival = number * 0.2
        sent = arrival + rng.expovariate(20)
        times = [sent + rng.expovariate(3)]
        for _ in range(rng.choice([0, 1, 5, 30])):
            times.append(times[-1] + rng.expovariate(20))
        failed = rng.random() < 0.2
        found.append(
            LoadRecord(
                f"r{number}",
                arrival,
                rng.randint(1, 99),
                len(times),
                first_token=times[0],
                finished=times[-1],
                finish_reason="error" if failed else rng.choice(["length", "stop"]),
                error="lost" if failed else None,
                sent=sent,
                token_times=times,
            )
        )
    return found


def vllms_figures(records: list[LoadRecord], slo_ms: dict[str, float]) -> dict[str, Any]:
    """`calculate_metrics`, in its own words: from latency, ttft and itl of each output."""
    good = [r for r in records if r.ok]
    ttfts, tpots, all_tpots, itls, e2els = [], [], [], [], []
    for r in good:
        assert r.first_token is not None
        assert r.finished is not None
        assert r.sent is not None
        ttft, latency = r.first_token - r.sent, r.finished - r.sent
        tpot = 0.0
        if r.output_tokens > 1:
            tpot = (latency - ttft) / (r.output_tokens - 1)
            tpots.append(tpot)
        all_tpots.append(tpot)
        itls += [b - a for a, b in zip(r.token_times, r.token_times[1:], strict=False)]
        ttfts.append(ttft)
        e2els.append(latency)
    times = {"ttft": ttfts, "tpot": all_tpots, "e2el": e2els}
    met = sum(all(times[name][n] <= limit / 1000 for name, limit in slo_ms.items()) for n in range(len(good)))
    starts = [r.sent for r in good]
    origin = min(starts)
    seconds = np.zeros(math.ceil(max(r.finished for r in good) - origin) + 1)
    for r in good:
        for t in r.token_times:
            seconds[int(t - origin)] += 1
    peak = max(sum(r.sent <= t < r.finished for r in good) for t in starts)
    every = [r for r in records if r.sent is not None]
    duration = max(r.finished for r in every) - min(r.sent for r in every)
    out = sum(r.output_tokens for r in good)
    found = {
        "duration": duration,
        "completed": len(good),
        "failed": len(records) - len(good),
        "total_input_tokens": sum(r.prompt_tokens for r in good),
        "total_output_tokens": out,
        "request_throughput": len(good) / duration,
        "request_goodput": met / duration,
        "output_throughput": out / duration,
        "max_output_tokens_per_s": seconds.max(),
        "max_concurrent_requests": peak,
    }
    for name, values in {"ttft": ttfts, "tpot": tpots, "itl": itls, "e2el": e2els}.items():
        found[f"mean_{name}_ms"] = np.mean(values) * 1000
        found[f"median_{name}_ms"] = np.median(values) * 1000
        found[f"std_{name}_ms"] = np.std(values) * 1000
        found[f"p99.9_{name}_ms"] = np.percentile(values, 99.9) * 1000
    return found


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_vllms(seed: int) -> None:
    records = loaded(seed)
    slo_ms = {"ttft": 400.0, "tpot": 60.0, "e2el": 2000.0}
    expected = vllms_figures(records, slo_ms)
    assert 0 < expected["request_goodput"] < expected["request_throughput"]
    slo = Slo.parse(f"{name}:{limit}" for name, limit in slo_ms.items())
    found = serving_metrics(records, slo, Selection.parse("ttft,tpot,itl,e2el", "99.9"))
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_from_the_schedule_lateness_counts_and_drops_are_misses() -> None:
    records = [
        LoadRecord("a", 0.0, 5, 3, None, 1.5, 2.0, "length", sent=1.0, token_times=[1.5, 1.6, 2.0]),
        LoadRecord("b", 1.0, 5, 1, None, 1.2, 1.2, "stop", sent=1.1, token_times=[1.2]),
        LoadRecord("c", 2.0, 5, 0, finish_reason="refused", error="full", sent=2.0),
        LoadRecord("d", 3.0, 5, 0, None, None, 4.0, "error", "lost", sent=3.0),
        LoadRecord("e", 4.0, 5, 0, finish_reason=UNFINISHED, sent=4.0),
        LoadRecord("f", 5.0, 5, 0, finish_reason=UNSENT),
    ]
    slo = Slo.parse(["ttft:600"])
    assert serving_metrics(records, slo)["request_goodput"] == pytest.approx(2 / 3.0)
    found = disaggregation(records, 2, slo)
    assert found["requests"] == {
        "scheduled": 6, "completed": 2, "failed": 1, "refused": 1, "unfinished": 1, "unsent": 1,
    }  # fmt: skip
    assert found["from_schedule"]["mean_ttft_ms"] == pytest.approx(1e3 * (1.5 + 0.2) / 2)
    assert found["lateness"]["p100_lateness_ms"] == pytest.approx(1000)
    assert found["slo"] == {"ttft_ms": 600, "attainment": 0.25, "goodput": pytest.approx(1 / 3)}
    assert found["per_gpu"]["output_throughput"] == pytest.approx(4 / 3.0 / 2)
    assert found["mean_concurrency"] == pytest.approx((1.0 + 0.1) / 1.0)


def test_without_a_completed_request_latencies_are_unknown() -> None:
    records = [LoadRecord("c", 2.0, 5, 0, finish_reason="refused", error="full", sent=2.0)]
    found = serving_metrics(records, Slo(1.0))
    assert (found["completed"], found["failed"], found["request_goodput"]) == (0, 1, 0.0)
    assert found["p99_itl_ms"] is None
    assert serving_metrics([])["duration"] == 0
    assert disaggregation(records, 1, Slo(1.0))["slo"]["attainment"] == 0


@pytest.mark.parametrize(
    ("latencies", "percentiles", "words"),
    [("ttft,ttlt", "99", "'ttlt'"), ("ttft", "p99", "'p99'"), ("ttft", "101", "101")],
)
def test_what_cannot_be_selected_is_explained(latencies: str, percentiles: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Selection.parse(latencies, percentiles)


def workload_of(seed: int, count: int, rate: float) -> Workload:
    return random_workload(count, Arrivals(rate, 0.7), (Uniform(1, 300), Uniform(1, 40)), seed)


def simulate(
    workload: Workload, policy: str, kills: tuple[Kill, ...] = (), **more: Any
) -> list[RequestRecord]:
    config = SimConfig(num_blocks=200, block_bytes=1000, link=LinkModel(1e-3, 0.0, 1e6), **more)
    result = Simulator(
        *create_policy(policy, 3),
        LinearTime(4e-3, 1e-4),
        workload.requests,
        config,
        kills,
    ).run()
    assert not result.problems()
    return result.records


@given(
    st.integers(0, 99),
    st.integers(1, 60),
    st.floats(0.5, 200),
    st.sampled_from(["1p2d", "round-robin", "collocated"]),
)
@settings(deadline=None, max_examples=25)
def test_littles_law_and_no_request_is_lost(seed: int, count: int, rate: float, policy: str) -> None:
    """L = λW over a run that begins and ends empty, and the stages of a request add up to its time."""
    workload = workload_of(seed, count, rate)
    kills = (Kill(workload.requests[-1].arrival / 2, "w2", 0.1),) if seed % 3 == 0 else ()
    records = simulate(workload, policy, kills)
    record = serving_result(records, workload, Setting("m", 3, policy, modelled=True), Slo(0.05))
    pd = record["pd"]
    assert sum(count for name, count in pd["requests"].items() if name != "scheduled") == count
    assert record["completed"] == count
    assert record["total_input_tokens"] == sum(each.prompt_tokens for each in workload.requests)
    assert record["total_output_tokens"] == sum(each.output_tokens for each in workload.requests)
    assert pd["mean_concurrency"] == pytest.approx(
        record["request_throughput"] * record["mean_e2el_ms"] / 1e3, rel=1e-6
    )
    # Peak: somebody has to be there; mean ITL: the pooled gaps are the time from first to last token.
    assert 1 <= record["max_concurrent_requests"] <= count
    served = Served(records)
    gaps = (served.output_tokens - 1).sum()
    if gaps:
        assert record["mean_itl_ms"] == pytest.approx(1e3 * (served.finished - served.first).sum() / gaps)
    if not kills:
        stages = [pd["stages"][name]["mean_ms"] or 0.0 for name in pd["stages"] if name != "transfer_hidden"]
        assert sum(stages) == pytest.approx(record["mean_e2el_ms"], rel=1e-3, abs=0.1)


def test_a_refused_request_of_a_simulation_is_a_miss() -> None:
    workload = Workload((SimRequest("a", 0.0, 100, 5), SimRequest("b", 0.1, 10**6, 5)), "two")
    record = serving_result(
        simulate(workload, "round-robin"), workload, Setting("m", 3, "round-robin", modelled=True), Slo(60.0)
    )
    assert record["pd"]["requests"]["refused"] == record["failed"] == 1
    assert record["pd"]["slo"]["attainment"] == 0.5


def test_the_keys_are_vllms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what `simulate` writes; `bench` makes its result by the same function."""
    path = tmp_path / "r.json"
    flags = ["simulate", "--num-prompts", "30", "--result-filename", str(path), "--goodput", "ttft:500"]
    assert main([*flags, "--request-rate", "inf", "--save-detailed", "--metric-percentiles", "99,99.9"]) == 0
    record = json.loads(path.read_text())
    assert set(record) == {*HEAD, *DETAILS, *latency_keys(("99", "99.9")), *OURS}
    assert (record["schema"], record["partial"], record["request_rate"]) == (SCHEMA, False, "inf")
    assert all(len(record[name]) == 30 for name in DETAILS)
    assert "machine" not in record["provenance"]
    ramp = ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "9"]
    assert main([*flags, *ramp, "--percentile-metrics", "ttft", "--burstiness", "inf"]) == 0
    record = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    ttft = {key for key in latency_keys(("50", "90", "99")) if "ttft" in key}
    assert set(record) == {*HEAD, *RAMP, *ttft, *OURS}
    assert "Request goodput (req/s):" in capsys.readouterr().out


def test_the_summary_says_what_was_interrupted() -> None:
    workload = workload_of(0, 40, 10.0)
    record = serving_result(
        loaded(1), workload, Setting("m", 2, "1p1d"), Slo.parse(["ttft:400"]), interrupted="w0 is gone"
    )
    assert record["partial"]
    text = summary(record)
    assert "PARTIAL: w0 is gone" in text
    assert "In time (ttft 400 ms):" in text
    assert "measured here: 2 workers" in text
