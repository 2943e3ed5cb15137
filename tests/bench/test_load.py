"""The load generator over real engines: it keeps to the schedule whatever the cluster does, and loses no request."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab.bench.load import LoadOptions, Progress, run_load
from nanopd_lab.bench.report import SCHEMA
from nanopd_lab.bench.workload import Uniform, Workload, random_workload
from nanopd_lab.cli import main
from nanopd_lab.cluster.actions import Limits
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cluster.launcher import WorkerLauncher
from nanopd_lab.router import Slo
from nanopd_lab.sim import SimRequest
from nanopd_lab.sim.arrivals import Arrivals

ENGINE = {"kv_cache_memory_bytes": 1 << 20}
CONFIG = ClusterConfig("random:tiny", workers=2, policy="1p1d", threads=1, engine=ENGINE)
PLAIN = LoadOptions(num_warmups=0, ready_timeout_s=0)


def workload_of(count: int, rate: float = 40.0, output: int = 9, seed: int = 0) -> Workload:
    return random_workload(count, Arrivals(rate), (Uniform(1, 60), Uniform(2, output)), seed)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(CONFIG) as cluster:
        yield cluster


def outcomes(record: dict[str, Any]) -> dict[str, int]:
    """Those that there are; they add up."""
    counts = dict(record["pd"]["requests"])
    total = counts.pop("scheduled")
    assert sum(counts.values()) == total
    return {name: count for name, count in counts.items() if count}


def test_every_token_is_stamped_and_every_request_accounted_for(cluster: Cluster) -> None:
    workload = workload_of(25)
    workload = replace(
        workload, requests=(*workload.requests, SimRequest("long", workload.requests[-1].arrival, 10**5, 3))
    )
    run = run_load(cluster, workload, LoadOptions(num_warmups=1))
    assert run.cause is None
    *served, long = run.records
    for record, request in zip(served, workload.requests, strict=False):
        assert record.ok
        assert (record.request_id, record.arrival) == (request.request_id, request.arrival)
        assert record.output_tokens == request.output_tokens == len(record.token_times)
        assert record.token_times == sorted(record.token_times)
        assert record.sent is not None
        assert record.arrival <= record.sent < record.token_times[0] == record.first_token
        assert record.token_times[-1] == record.finished
        assert record.path is not None
        assert record.path.complete
        assert not record.path.problems()
    assert (long.finish_reason, long.output_tokens) == ("refused", 0)
    assert "max_model_len" in str(long.error)
    cluster.check_integrity()


def test_the_result_of_a_cluster_obeys_littles_law(cluster: Cluster) -> None:
    record = cluster.bench(workload_of(30, seed=3), Slo(10.0), num_warmups=0)
    assert outcomes(record) == {"completed": 30}
    assert record["pd"]["mean_concurrency"] == pytest.approx(
        record["request_throughput"] * record["mean_e2el_ms"] / 1e3
    )
    assert record["pd"]["slo"]["attainment"] == 1.0
    assert record["request_goodput"] == record["request_throughput"]
    assert record["pd"]["disaggregated"] == 30
    assert record["pd"]["transferred_tokens"] == record["total_input_tokens"]
    assert record["max_output_tokens_per_s"] <= record["total_output_tokens"]
    assert record["mean_itl_ms"] > 0
    # The stages are stamped by controller and workers on one clock.
    stages = record["pd"]["stages"]
    parts = sum(stage["mean_ms"] for name, stage in stages.items() if name != "transfer_hidden")
    assert 0 < parts <= record["pd"]["from_schedule"]["mean_e2el_ms"] * 1.05


def test_a_cap_on_concurrency_holds_and_waiting_counts_from_the_schedule(cluster: Cluster) -> None:
    workload = workload_of(16, rate=float("inf"))
    record = cluster.bench(workload, num_warmups=0, max_concurrency=2)
    assert outcomes(record) == {"completed": 16}
    assert record["max_concurrent_requests"] == 2
    assert record["max_concurrency"] == 2
    assert record["pd"]["from_schedule"]["mean_ttft_ms"] > record["mean_ttft_ms"]
    assert record["request_rate"] == "inf"


def test_a_stalled_cluster_does_not_hold_the_sender_up(cluster: Cluster) -> None:
    """Workers are stopped before the run, and go on only once all requests have been sent."""
    launcher = cluster.launcher
    assert isinstance(launcher, WorkerLauncher)
    pids = [pid for name in cluster.config.names if (pid := launcher.pid(name)) is not None]
    seen: list[Progress] = []

    def report(progress: Progress) -> None:
        seen.append(progress)
        if progress.sent == 12:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        run = run_load(cluster, workload_of(12), PLAIN, report)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert all(each.completed == 0 for each in seen if each.sent < 12)
    assert all(record.ok for record in run.records)
    last_sent = max(record.sent or 0.0 for record in run.records)
    assert all((record.first_token or 0.0) > last_sent for record in run.records)
    assert any(each.running == 12 for each in seen)


def test_what_is_not_finished_at_the_end_of_the_drain_has_failed(cluster: Cluster) -> None:
    launcher = cluster.launcher
    assert isinstance(launcher, WorkerLauncher)
    pid = launcher.pid("w1")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        run = run_load(cluster, workload_of(4), replace(PLAIN, drain_s=0.3), self_continue(pid))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert run.cause is None
    assert [record.finish_reason for record in run.records] == ["abort"] * 4
    assert all("not finished 0.3 s after" in str(record.error) for record in run.records)


def self_continue(pid: int) -> Any:
    """Let the worker go on once its requests have been given up, so that they settle."""

    def report(progress: Progress) -> None:
        if progress.failed == progress.total:
            os.kill(pid, signal.SIGCONT)

    return report


def test_an_interrupt_keeps_what_was_measured(cluster: Cluster) -> None:
    count = itertools.count()

    def interrupt(progress: Progress) -> None:
        if progress.completed >= 3 and next(count) == 0:
            raise KeyboardInterrupt

    record = cluster.bench(workload_of(400, output=30), num_warmups=0, report=interrupt, detailed=True)
    assert record["partial"]
    assert record["pd"]["interrupted"] == "interrupted"
    assert record["completed"] >= 3
    assert outcomes(record)["completed"] == record["completed"]
    assert sum(length > 0 for length in record["output_lens"]) == record["completed"]
    # The cluster is as good as new.
    assert outcomes(cluster.bench(workload_of(3), num_warmups=0)) == {"completed": 3}
    cluster.check_integrity()


def test_a_full_queue_refuses_and_refused_requests_are_misses() -> None:
    limits = Limits(max_queue=1, max_jobs=1)
    config = replace(CONFIG, policy="collocated", workers=1, launcher="inline", limits=limits)
    with Cluster(config) as cluster:
        record = cluster.bench(workload_of(10, rate=float("inf")), Slo(1e3), num_warmups=0)
    assert outcomes(record) == {"completed": 2, "refused": 8}
    assert record["failed"] == 8
    assert record["pd"]["slo"]["attainment"] == 0.2


def test_a_lost_cluster_ends_the_run_and_keeps_what_was_measured() -> None:
    with Cluster(replace(CONFIG, policy="collocated", workers=1, max_restarts=0)) as cluster:
        launcher = cluster.launcher
        assert isinstance(launcher, WorkerLauncher)
        pid = launcher.pid("w0")
        assert pid is not None

        def kill(progress: Progress) -> None:
            if progress.completed >= 2:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

        record = cluster.bench(workload_of(2000, output=30), num_warmups=0, report=kill)
    assert record["partial"]
    assert "no worker is left" in record["pd"]["interrupted"]
    assert record["completed"] >= 2
    assert outcomes(record)["unsent"] > 0


def test_a_cluster_that_cannot_serve_is_found_out_before() -> None:
    with (
        Cluster(replace(CONFIG, launcher="inline")) as cluster,
        pytest.raises(ValueError, match="nothing was"),
    ):
        cluster.bench(Workload((SimRequest("a", 0.0, 10**5, 3),), "long"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_concurrency": 0}, "max_concurrency is 0"),
        ({"num_warmups": -1}, "num_warmups is -1"),
        ({"drain_s": 0}, "drain_s is 0"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoadOptions(**options)


def test_the_command_writes_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "result.json"
    arguments = [
        "bench", "--model", "random:tiny", "--launcher", "inline", "--policy", "1p1d", "--num-prompts", "8",
        "--request-rate", "200", "--random-input-len", "20", "--random-output-len", "5", "--goodput", "ttft:60000",
        "--kv-cache-memory-bytes", str(1 << 20), "--save-detailed", "--result-filename", str(path),
    ]  # fmt: skip
    assert main(arguments) == 0
    record = json.loads(path.read_text())
    assert (record["schema"], record["completed"], record["backend"]) == (SCHEMA, 8, "nanopd-lab")
    assert record["pd"]["launcher"] == "inline"
    assert record["provenance"]["machine"]["cores"] > 0
    assert [len(gaps) for gaps in record["itls"]] == [4] * 8
    assert "8 of 8 completed" in capsys.readouterr().out
    assert main([*arguments, "--max-concurrency", "0"]) == 2
    assert "max_concurrency is 0" in capsys.readouterr().err
