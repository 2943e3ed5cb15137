"""`nanopd-lab simulate`: from flags to a summary, a result file and a trace."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab.cli import main
from nanopd_lab.cost.hardware import load_model
from nanopd_lab.sim.workload import Lengths, gamma_arrivals


def simulate(*flags: str) -> int:
    return main(["simulate", "--num-prompts", "60", "--workers", "4", *flags])


def result(tmp_path: Path, *flags: str) -> dict[str, Any]:
    assert simulate("--result-filename", str(tmp_path / "sim.json"), *flags) == 0
    found: dict[str, Any] = json.loads((tmp_path / "sim.json").read_text())
    return found


def test_a_result_has_the_benchmarks_keys_and_says_it_is_modelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = result(tmp_path, "--policy", "2p2d", "--trace", str(tmp_path / "trace.json"))
    assert record["completed"] == 60
    assert record["total_output_tokens"] == 60 * 128
    assert record["pd"]["disaggregated"] == 60
    assert record["pd"]["transferred_tokens"] == 60 * 1024
    assert 0 < record["median_ttft_ms"] <= record["p99_ttft_ms"] < record["mean_e2el_ms"]
    assert "modelled" in record["backend"]
    assert "modelled: 4 workers of h100" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 60


def test_the_same_seed_gives_the_same_result(tmp_path: Path) -> None:
    first, second = (result(tmp_path, "--dataset-name", "azure-like", "--seed", "3") for _ in range(2))
    other = result(tmp_path, "--dataset-name", "azure-like", "--seed", "4")
    for record in (first, second):
        del record["date"], record["provenance"]
    assert first == second
    assert other["mean_e2el_ms"] != first["mean_e2el_ms"]


def test_a_decode_step_takes_what_reading_the_weights_takes(tmp_path: Path) -> None:
    """By hand: Qwen3-8B's matrices and its vocabulary projection in 16 bits at the H100's 3,071 GB/s."""
    record = result(tmp_path, "--request-rate", "0.1", "--policy", "collocated", "--random-input-len", "8")
    layer = 4096 * (2 * 32 * 128 + 2 * 8 * 128 + 3 * 12288)
    limit = 2 * (36 * layer + 151_936 * 4096) / 3.071e12 * 1e3
    assert record["mean_tpot_ms"] == pytest.approx(limit, rel=0.02)


def test_a_fitted_model_moves_its_blocks_over_its_link(tmp_path: Path) -> None:
    flags = ["--cost-model", "cpu-smollm2-fp32", "--policy", "2p2d", "--request-rate", "0.2"]
    flags += ["--random-input-len", "64", "--random-output-len", "8"]
    slow = result(tmp_path, *flags, "--block-bytes", "737280000")
    quick = result(tmp_path, *flags, "--block-bytes", "737280")
    assert slow["mean_tpot_ms"] > quick["mean_tpot_ms"] + 10


def test_arrivals_are_gamma_gaps_stretched_to_the_rate() -> None:
    lengths = Lengths(10, 0.0, 10), Lengths(5, 0.0, 5)
    spread = {}
    for burstiness in (0.25, 1.0, 4.0):
        times = [each.arrival for each in gamma_arrivals(20_000, 8.0, lengths, 3, burstiness)]
        assert times[-1] == pytest.approx(20_000 / 8.0, rel=1e-12)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        spread[burstiness] = statistics.pstdev(gaps) / statistics.fmean(gaps)
    # The coefficient of variation of a gamma distribution is 1 / sqrt(shape).
    assert spread == pytest.approx({0.25: 2.0, 1.0: 1.0, 4.0: 0.5}, rel=0.05)
    assert {each.arrival for each in gamma_arrivals(5, float("inf"), lengths)} == {0.0}


def test_a_killed_worker_fails_nothing(tmp_path: Path) -> None:
    kills = ["--kill", "w0@0.5+1", "--kill", "w3@1"]
    record = result(tmp_path, *kills, "--beat", "0.5", "--burstiness", "0.5", "--request-rate", "inf")
    assert record["completed"] == 60
    assert (record["request_rate"], record["burstiness"]) == ("inf", 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hardware", "h300"], "unknown hardware 'h300'; choose one of"),
        (["--model", "qwen9"], "qwen9"),
        (["--kill", "w0"], "write w0@12.5"),
        (["--kill", "w9@1"], "worker 'w9' is to be killed"),
        (["--burstiness", "0"], "burstiness is 0;"),
        (["--policy", "9p9d"], "needs 9 + 9 workers"),
        (["--request-rate", "0"], "rate is 0 requests/s;"),
        (["--num-prompts", "0"], "must be at least 1"),
        (["--random-input-len", "0"], "a length of 0 tokens"),
        (["--random-prefix-len", "-1"], "prefixes of -1 tokens"),
    ],
)
def test_a_wrong_flag_is_explained(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(*flags) == 2
    assert message in capsys.readouterr().err


def test_a_cost_model_says_how_large_a_block_is_or_the_caller_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = load_model("cpu-smollm2-fp32")
    assert simulate("--cost-model", "cpu-smollm2-fp32", "--num-prompts", "3") == 0
    path = tmp_path / "model.json"
    replace(cost, fit={}).save(path)
    assert simulate("--cost-model", str(path), "--num-prompts", "3") == 2
    assert "--block-bytes" in capsys.readouterr().err
    assert simulate("--cost-model", str(path), "--num-prompts", "3", "--block-bytes", "737280") == 0


def test_prompts_that_share_a_prefix_find_it_in_the_cache(tmp_path: Path) -> None:
    """One worker, one prompt after the other: all but the first find the prefix's whole blocks, 6 of 16 tokens."""
    flags = [
        "--workers",
        "1",
        "--policy",
        "collocated",
        "--request-rate",
        "0.5",
        "--random-prefix-len",
        "100",
    ]
    flags += ["--random-input-len", "50", "--random-output-len", "4"]
    cached = result(tmp_path, *flags)
    assert cached["total_input_tokens"] == 60 * 150
    assert cached["pd"]["cached_tokens"] == 59 * 96
    plain = result(tmp_path, *flags, "--no-enable-prefix-caching")
    assert plain["pd"]["cached_tokens"] == 0
    assert plain["mean_ttft_ms"] >= cached["mean_ttft_ms"]
    # `azure-like` prompts share nothing, whatever the flag of the other data set says.
    assert result(tmp_path, "--dataset-name", "azure-like", *flags)["pd"]["cached_tokens"] == 0


def test_repeated_prefixes_are_as_many_as_asked_for(tmp_path: Path) -> None:
    flags = ["--workers", "1", "--policy", "collocated", "--dataset-name", "prefix_repetition"]
    flags += ["--prefix-repetition-prefix-len", "64", "--prefix-repetition-num-prefixes", "4"]
    record = result(tmp_path, *flags, "--request-rate", "0.5", "--prefix-repetition-output-len", "4")
    assert record["total_input_tokens"] == 60 * (64 + 256)
    assert record["pd"]["cached_tokens"] == (60 - 4) * 64
    lengths = Lengths(10, 0.0, 10), Lengths(5, 0.0, 5)
    requests = gamma_arrivals(12, 8.0, lengths, 3, prefix_tokens=7, num_prefixes=3)
    assert sorted(each.prefix for each in requests) == [0] * 4 + [1] * 4 + [2] * 4
    assert {(each.prompt_tokens, each.prefix_tokens) for each in requests} == {(17, 7)}


def test_goodput_is_printed_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = result(
        tmp_path, "--goodput", "ttft:26", "tpot:100", "--policy", "nanopd", "--request-rate", "40"
    )
    slo = record["pd"]["slo"]
    assert (slo["ttft_ms"], slo["tpot_ms"]) == (26, 100)
    assert 0 < slo["attainment"] < 1
    assert record["request_goodput"] == pytest.approx(
        slo["attainment"] * record["num_prompts"] / record["duration"]
    )
    out = capsys.readouterr().out
    assert "In time (ttft 26, tpot 100 ms):" in out
    assert f"{slo['attainment']:.1%}" in out
    assert result(tmp_path)["request_goodput"] is None
    assert simulate("--goodput", "ttft:soon") != 0


def test_the_oracle_is_not_behind_a_policy_and_says_what_no_routing_exceeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset-name", "azure-like", "--request-rate", "80", "--goodput", "ttft:300", "tpot:12"]
    flags += ["--cost-model", "h100-qwen3-8b", "--oracle-simulations", "5"]
    shares = {
        name: result(tmp_path, *flags, "--policy", name)["pd"]["slo"]["attainment"]
        for name in ("collocated", "1p3d", "2p2d", "3p1d", "oracle")
    }
    assert shares["oracle"] == max(shares.values())
    printed = re.search(r"oracle: (\d+) of 60 .* at most (\d+) by any", capsys.readouterr().out)
    assert printed is not None
    assert int(printed[1]) / 60 == pytest.approx(shares["oracle"])
    assert int(printed[1]) <= int(printed[2]) <= 60
    assert simulate("--policy", "oracle") == 2
    assert "the oracle needs objectives, and there are none" in capsys.readouterr().err
    assert simulate(*flags, "--policy", "oracle", "--kill", "w0@1") == 2


def test_requests_that_are_refused_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    flags = ["simulate", "--num-prompts", "10", "--num-blocks", "3", "--result-filename", str(result)]
    assert main(flags) == 0
    told = capsys.readouterr().out
    assert "0 of 10 completed, 10 refused" in told
    assert "= 1152 tokens; the largest worker takes 48" in told
    assert "the largest worker takes 48" in json.loads(result.read_text())["pd"]["first_error"]


def test_a_trace_that_cannot_be_written_is_found_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["simulate", "--num-prompts", "10", "--trace", str(tmp_path / "none" / "trace.json")]) == 2
    found = capsys.readouterr()
    assert "there is no folder" in found.err
    assert not found.out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--trace-speed", "2"], "trace-speed is 2, and data set 'random' is no trace"),
        (["--block-bytes", "100"], "it goes with --cost-model"),
        (["--cost-model", "cpu-smollm2-fp32", "--block-bytes", "-5"], "block_bytes is -5"),
        (["--policy", "oracle"], "the oracle needs objectives, and there are none"),
        (
            ["--policy", "oracle", "--goodput", "ttft:500", "--oracle-simulations", "0"],
            "oracle-simulations is 0",
        ),
    ],
)
def test_flags_that_say_nothing_here_are_refused(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(*flags) == 2
    assert told in capsys.readouterr().err


def test_no_flag_is_taken_for_another_that_begins_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """`--share` of a plan was `--sharegpt-output-len`."""
    with pytest.raises(SystemExit):
        main(["plan", "--gpus", "2", "--goodput", "ttft:500", "--share", "2"])
    assert "unrecognized arguments: --share 2" in capsys.readouterr().err
