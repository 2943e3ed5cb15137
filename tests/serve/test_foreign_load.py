"""The server under a load generator that nobody here wrote, GuideLLM: both must tell the same of the same run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import pytest

from nanopd_lab.model.embedded import embedded_model

MODEL, REQUESTS, OUTPUT_TOKENS = "smollm2", 9, 8
# The clocks of both sides (time.time there, time.monotonic here) may be adjusted against each other meanwhile.
CLOCKS_MS = 2.0

pytestmark = pytest.mark.skipif(
    find_spec("guidellm") is None,
    reason="needs GuideLLM: pip install --constraint constraints.txt --editable '.[load]'",
)


@contextmanager
def serving() -> Iterator[str]:
    command = [sys.executable, "-m", "nanopd_lab.cli", "serve", "--model", MODEL, "--workers", "2"]
    command += ["--policy", "1p1d", "--port", "0", "--enable-per-request-metrics"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+(?=/v1)", server.stdout.readline())
            assert found is not None, "the server did not start"
            yield found[0]
        finally:
            server.terminate()


def counted_at(url: str, path: Path) -> dict[str, Any]:
    """What GuideLLM found: three streams of chats, prompts of different lengths."""
    backend = {"kind": "openai_http", "target": url, "model": MODEL}
    data = {
        "kind": "synthetic_text", "prompt_tokens": 64, "prompt_tokens_stdev": 40, "prompt_tokens_min": 8,
        "prompt_tokens_max": 160, "output_tokens": OUTPUT_TOKENS,
    }  # fmt: skip
    options = {
        "backend": backend,
        "profile": {"kind": "concurrent", "streams": 3},
        "constraint": {"kind": "max_requests", "count": REQUESTS},
        "tokenizer": {"kind": "huggingface_auto", "model": str(embedded_model())},
        "data": data,
        "output": {"kind": "json", "path": str(path)},
    }
    words = [word for name, value in options.items() for word in (f"--{name}", json.dumps(value))]
    # A process for each stream, as it would have it, is a second of imports each.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "GUIDELLM__MAX_WORKER_PROCESSES": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "guidellm", "run", *words, "--disable-console-interactive"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (benchmark,) = json.loads(path.read_text())["benchmarks"]
    return benchmark


def measured_at(url: str) -> dict[str, float]:
    """What the server says of the run, by the names of /metrics, summed over labels."""
    sums: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            sums[name.split("{")[0]] = sums.get(name.split("{")[0], 0.0) + float(value)
    return sums


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, float]]:
    """Once more, on a new server, if GuideLLM does not report all requests that it has sent: on a busy machine it has
    left out one of nine, neither successful nor errored nor incomplete, that the server had answered.
    """
    for number in range(3):
        with serving() as url:
            counted = counted_at(url, tmp_path_factory.mktemp("load") / f"found-{number}.json")
            measured = measured_at(url)
        totals = counted["metrics"]["request_totals"]
        if sum(totals[name] for name in ("successful", "errored", "incomplete")) >= REQUESTS:
            break
    return counted, measured


@pytest.fixture(scope="module")
def counted(both: tuple[dict[str, Any], dict[str, float]]) -> dict[str, Any]:
    return both[0]


@pytest.fixture(scope="module")
def measured(both: tuple[dict[str, Any], dict[str, float]]) -> dict[str, float]:
    return both[1]


def test_counts_are_equal(counted: dict[str, Any], measured: dict[str, float]) -> None:
    totals, metrics = counted["metrics"]["request_totals"], counted["metrics"]
    assert (totals["successful"], totals["errored"], totals["incomplete"]) == (REQUESTS, 0, 0)
    assert measured["nanopd_requests_total"] == REQUESTS
    prompts = metrics["prompt_token_count"]["successful"]["total_sum"]
    outputs = metrics["output_token_count"]["successful"]["total_sum"]
    assert outputs == measured["nanopd_generation_tokens_total"] == REQUESTS * OUTPUT_TOKENS
    assert prompts == measured["nanopd_prompt_tokens_total"]
    requests = counted["requests"]["successful"]
    assert len({request["input_metrics"]["text_tokens"] for request in requests}) > 3
    cached = sum(request["input_metrics"]["cached_tokens"] for request in requests)
    assert cached == measured["nanopd_cached_tokens_total"]


def test_what_an_answer_says_of_its_times_adds_up_to_the_servers_histograms(
    counted: dict[str, Any], measured: dict[str, float]
) -> None:
    said = [request["response_metrics"] for request in counted["requests"]["successful"]]
    first = [each["queue_time_ms"] + each["time_to_first_token_ms"] for each in said]
    assert sum(first) == pytest.approx(1e3 * measured["nanopd_time_to_first_token_seconds_sum"])
    whole = [one + each["generation_time_ms"] for one, each in zip(first, said, strict=True)]
    assert sum(whole) == pytest.approx(1e3 * measured["nanopd_e2e_request_latency_seconds_sum"], rel=1e-3)
    itl = [each["mean_itl_ms"] for each in said]
    assert sum(itl) == pytest.approx(1e3 * measured["nanopd_time_per_output_token_seconds_sum"])


def test_latencies_agree(counted: dict[str, Any], measured: dict[str, float]) -> None:
    """Of every request the client waits as long as the server took and, on its way there and back, little more."""
    ours_first, ours_whole, theirs_first, theirs_whole = [], [], [], []
    for request in counted["requests"]["successful"]:
        said = request["response_metrics"]
        ours_first.append(said["queue_time_ms"] + said["time_to_first_token_ms"])
        ours_whole.append(ours_first[-1] + said["generation_time_ms"])
        theirs_first.append(request["time_to_first_token_ms"])
        theirs_whole.append(1e3 * request["request_latency"])
        assert theirs_first[-1] >= ours_first[-1] - CLOCKS_MS
        assert theirs_whole[-1] >= ours_whole[-1] - CLOCKS_MS
    # Two processes of Python on a machine that does other things: a quarter of a second, and a quarter.
    allowed_ms = 250 + 0.25 * mean(ours_whole)
    print(
        f"TTFT {mean(theirs_first):.1f} ms there, {mean(ours_first):.1f} here; E2E {mean(theirs_whole):.1f}, "
        f"{mean(ours_whole):.1f}; allowed {allowed_ms:.0f}"
    )
    assert mean(theirs_first) - mean(ours_first) < allowed_ms
    assert mean(theirs_whole) - mean(ours_whole) < allowed_ms
    # What GuideLLM calls ITL is our TPOT: (last - first) / (tokens - 1). Its two ends are off by what was allowed.
    itl = counted["metrics"]["inter_token_latency_ms"]["successful"]["mean"]
    tpot = 1e3 * measured["nanopd_time_per_output_token_seconds_sum"] / REQUESTS
    print(f"TPOT {itl:.2f} ms there, {tpot:.2f} here")
    assert abs(itl - tpot) < allowed_ms / (OUTPUT_TOKENS - 1)
