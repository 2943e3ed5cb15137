"""What holds of workers in processes of their own, whoever has started them: they compute what one engine does, and are
killed, stopped, slow, orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab import LLM, Cluster, ClusterConfig, SamplingParams
from nanopd_lab.cluster.actions import ClusterDownError, Limits
from nanopd_lab.cluster.starter import WorkerStartError
from tests.engine.test_token_identity import prompts

POOL = 1 << 25
ENGINE = {"kv_cache_memory_bytes": POOL, "max_num_batched_tokens": 64, "max_model_len": 2048}
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
PATIENCE_S = 180.0  # with what comes in the end, on however busy a machine


def start(policy: str = "1p1d", workers: int = 2, **more: Any) -> Cluster:
    options = {"devices": ("cpu",) * workers, "threads": 1, "engine": ENGINE, **more}
    return Cluster(ClusterConfig("random:tiny", workers=workers, policy=policy, **options))


def alone(llm: LLM, batch: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(batch, params, use_tqdm=False)]


def wait_for(cluster: Cluster, condition: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Until it holds; outputs meanwhile are left for whoever polls."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def route(cluster: Cluster, name: str) -> tuple[str, str]:
    with cluster._lock:
        job = cluster.controller._jobs[name, 0]
        attempt = job.path.attempts[-1]
    return attempt.route.prefill, attempt.route.decode


def tokens_of(cluster: Cluster, name: str) -> int:
    with cluster._lock:
        job = cluster.controller._jobs.get((name, 0))
        return len(job.outputs) if job else 0


def finish(cluster: Cluster, names: list[str]) -> dict[str, Any]:
    return {output.request_id: output for output in cluster.stream(names)}


PARENT = """
import time
from nanopd_lab import Cluster, ClusterConfig, SamplingParams
if __name__ == "__main__":
    cluster = Cluster(ClusterConfig("random:tiny", workers=2, policy="1p1d", devices=("cpu", "cpu"), threads=1,
                                    launcher="{launcher}", engine={{"kv_cache_memory_bytes": 1 << 24}}))
    cluster.submit([1] * 100, SamplingParams(max_tokens=100000 // 100, ignore_eos=True))
    print(cluster.launcher.pid("w0"), cluster.launcher.pid("w1"), flush=True)
    time.sleep(60)
"""


def left_behind() -> set[str]:
    """Shared memory and Ray's folders."""
    folders = Path(tempfile.gettempdir()).glob("nanopd-ray-*")
    return {str(path) for path in (*Path("/dev/shm").iterdir(), *folders)}


class LauncherSuite:
    """The tests; a subclass names the launcher."""

    launcher = ""
    killed = ""  # how the reason of a death by SIGKILL begins

    @classmethod
    def start(cls, policy: str = "1p1d", workers: int = 2, **more: Any) -> Cluster:
        return start(policy, workers, launcher=cls.launcher, **more)

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls) -> LLM:
        return LLM("random:tiny", device="cpu", **ENGINE)  # type: ignore[arg-type]

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls) -> Iterator[Cluster]:
        """One prefill and one decode worker for the tests that leave them alive."""
        with cls.start(trace=True) as cluster:
            yield cluster

    def test_tokens_are_those_of_one_engine(self, pair: Cluster, llm: LLM) -> None:
        batch = prompts([3, 40, 77, 300, 64, 1], shared=10)
        sampled = SamplingParams(max_tokens=9, temperature=0.9, seed=4, ignore_eos=True)
        for params in (GREEDY, sampled):
            outputs = pair.generate(batch, params, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == alone(llm, batch, params)
            for output, prompt in zip(outputs, batch, strict=True):
                (path,) = output.paths
                assert str(path.route) == "w0→w1"
                assert not path.problems()
                assert path.attempts[-1].decode is not None
                assert path.attempts[-1].decode.received + path.attempts[-1].decode.first_cached == len(
                    prompt
                )
        pair.check_integrity()

    def test_it_says_how_kv_moves_and_why(self, pair: Cluster) -> None:
        addresses = pair.launcher._children.values()  # type: ignore[union-attr]
        assert {child.address.transport for child in addresses if child.address} == {pair.transport.name}
        assert "shared memory" in pair.transport.reason

    def test_what_is_given_back_while_a_worker_is_asked_is_not_lost(self, pair: Cluster) -> None:
        for prompt in prompts([300, 40], seed=11):
            name = pair.submit(prompt, SamplingParams(max_tokens=500, temperature=0, ignore_eos=True))
            wait_for(pair, lambda name=name: tokens_of(pair, name) >= 1)  # type: ignore[misc]
            pair.cancel(name)
            pair.check_integrity()
            assert finish(pair, [name])[name].outputs[0].finish_reason == "abort"
        pair.check_integrity()

    def test_chunks_are_pulled_while_the_next_ones_are_computed(self, pair: Cluster) -> None:
        """From real timestamps of both processes: a pull begins before the prompt's last chunk is computed."""
        chunks, begins = [], []
        for seed in range(
            9, 29
        ):  # a machine that is busy may keep the target waiting until the source is done
            pair.steps()
            (output,) = pair.generate(prompts([1500], seed=seed), GREEDY, use_tqdm=False)
            usage = output.paths[0].attempts[-1]
            assert usage.prefill is not None
            assert usage.decode is not None
            begins = [begin for begin, _ in usage.decode.pulls]
            chunks = [step for step in pair.steps()["w0"] if any(not decode for *_, decode in step.chunks)]
            assert len(chunks) >= 1500 // 64
            if len(begins) >= 3 and begins[0] < usage.prefill.sampled:  # type: ignore[operator]
                break
        assert len(begins) >= 3
        assert chunks[0].begin < begins[0] < chunks[-1].end

    def test_decodes_of_several_requests_share_steps(self, pair: Cluster) -> None:
        pair.steps()
        pair.generate(
            prompts([30] * 8, seed=2),
            SamplingParams(max_tokens=60, temperature=0, ignore_eos=True),
            use_tqdm=False,
        )
        batches = [len(step.chunks) for step in pair.steps()["w1"]]
        assert max(batches) > 1

    def test_late_messages_change_nothing(self, pair: Cluster, llm: LLM) -> None:
        batch = prompts([300, 40, 120], seed=8)
        children = pair.launcher._children  # type: ignore[union-attr]
        children["w0"].lag_s, children["w1"].lag_s = 0.05, 0.3
        try:
            outputs = pair.generate(batch, GREEDY, use_tqdm=False)
        finally:
            children["w0"].lag_s = children["w1"].lag_s = 0.0
        assert [output.outputs[0].token_ids for output in outputs] == alone(llm, batch, GREEDY)
        assert all(len(output.paths[0].attempts) == 1 for output in outputs)
        assert max(output.paths[0].transfer_visible_s or 0 for output in outputs) > 0.1
        pair.check_integrity()

    def test_two_threads_get_their_own_answers(self, pair: Cluster, llm: LLM) -> None:
        """Neither takes away what the other waits for."""
        batches = [prompts([20 + 7 * i, 60], seed=20 + i) for i in range(4)]
        with ThreadPoolExecutor(4) as threads:
            outputs = list(
                threads.map(
                    lambda batch: pair.generate(batch, GREEDY, use_tqdm=False), batches, timeout=PATIENCE_S
                )
            )
        for batch, found in zip(batches, outputs, strict=True):
            assert [output.outputs[0].token_ids for output in found] == alone(llm, batch, GREEDY)

    def test_a_caller_cancels(self, pair: Cluster) -> None:
        name = pair.submit(prompts([40])[0], LONG)
        wait_for(pair, lambda: tokens_of(pair, name) >= 3)
        pair.cancel(name)
        output = finish(pair, [name])[name]
        assert output.outputs[0].finish_reason == "abort"
        assert 3 <= len(output.outputs[0].token_ids) < 400
        pair.check_integrity()

    def test_a_deadline_is_kept(self, pair: Cluster) -> None:
        name = pair.submit(prompts([40])[0], LONG, timeout_s=0.15)
        output = finish(pair, [name])[name]
        assert "deadline passed after" in str(output.outputs[0].error)
        pair.check_integrity()

    @pytest.mark.slow
    def test_workers_are_killed_and_stopped_while_they_work(self, llm: LLM) -> None:
        """kill -9 of the source and of the target at several moments, then a stopped one: nothing is lost or wrong."""
        batch = prompts([1200, 40, 700, 90], seed=5)
        want = alone(llm, batch, LONG)
        limits = Limits(heartbeat_s=8.0, max_attempts=10)
        with self.start("1p2d", 3, limits=limits, max_restarts=10) as cluster:
            for victim, moment in [(0, 0), (1, 0), (0, 1), (1, 1), (1, 30)]:
                names = [cluster.submit(prompt, LONG) for prompt in batch]
                wait_for(cluster, lambda moment=moment, name=names[0]: tokens_of(cluster, name) >= moment)  # type: ignore[misc]
                if moment == 0:
                    time.sleep(0.03)
                pid = cluster.launcher.pid(route(cluster, names[0])[victim])  # type: ignore[union-attr]
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                outputs = finish(cluster, names)
                assert [outputs[name].outputs[0].token_ids for name in names] == want
                assert not [p for name in names for path in outputs[name].paths for p in path.problems()]
                wait_for(cluster, lambda: len(cluster.workers()) == 3)
                cluster.check_integrity()
            name = cluster.submit(batch[1], LONG)
            wait_for(cluster, lambda: tokens_of(cluster, name) >= 3)
            stopped = route(cluster, name)[1]
            pid = cluster.launcher.pid(stopped)  # type: ignore[union-attr]
            os.kill(pid, signal.SIGSTOP)  # type: ignore[arg-type]
            output = finish(cluster, [name])[name]
            assert output.outputs[0].token_ids == want[1]
            assert f"{stopped} was silent for 8.0 s" in str(output.paths[0].attempts[0].failure)
            wait_for(cluster, lambda: len(cluster.workers()) == 3)
            wait_for(cluster, lambda: not Path(f"/proc/{pid}").exists())
            cluster.check_integrity()

    def test_without_restarts_the_last_death_is_an_error(self, llm: LLM) -> None:
        with self.start("1p1d", max_restarts=0) as cluster:
            batch = prompts([50], seed=3)
            name = cluster.submit(batch[0], LONG)
            wait_for(cluster, lambda: tokens_of(cluster, name) >= 2)
            os.kill(cluster.launcher.pid("w0"), signal.SIGKILL)  # type: ignore[arg-type, union-attr]
            assert finish(cluster, [name])[name].outputs[0].token_ids == alone(llm, batch, LONG)[0]
            # The one that is left serves alone.
            assert cluster.generate(batch, GREEDY, use_tqdm=False)[0].paths[0].route.collocated  # type: ignore[union-attr]
            name = cluster.submit(batch[0], LONG)
            wait_for(cluster, lambda: tokens_of(cluster, name) >= 2)
            os.kill(cluster.launcher.pid("w1"), signal.SIGKILL)  # type: ignore[arg-type, union-attr]
            error = finish(cluster, [name])[name].outputs[0].error
            assert f"no worker is left; the last one, w1, {self.killed}" in str(error)
            with pytest.raises(ClusterDownError):
                cluster.submit(batch[0], GREEDY)

    def test_a_worker_that_cannot_start_says_why(self) -> None:
        with pytest.raises(
            WorkerStartError, match=r"worker w\d could not be started: ValueError: max_model_len is 999999"
        ):
            self.start(engine={**ENGINE, "max_model_len": 999_999})

    def test_nothing_outlives_its_parent(self) -> None:
        """Neither processes nor shared memory nor folders, when the parent is killed in mid-work."""
        before = left_behind()
        script = PARENT.format(launcher=self.launcher)
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + PATIENCE_S
        while any(Path(f"/proc/{pid}").exists() for pid in children) or left_behind() - before:
            assert time.monotonic() < deadline, f"outlive their parent: {children}, {left_behind() - before}"
            time.sleep(0.05)

    def test_close_is_orderly_and_final(self) -> None:
        cluster = self.start()
        pids = [cluster.launcher.pid(name) for name in ("w0", "w1")]  # type: ignore[union-attr]
        cluster.close()
        cluster.close()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        with pytest.raises(ValueError, match="closed"):
            cluster.generate([[1, 2, 3]], GREEDY)
