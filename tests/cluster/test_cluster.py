"""A cluster of real engines in one thread: on every route the tokens of one engine, and so Hugging Face's."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from nanopd_lab import LLM, Cluster, ClusterConfig, SamplingParams
from nanopd_lab.bench.workload import Fixed, random_workload
from nanopd_lab.cluster.actions import ClusterBusyError, Limits
from nanopd_lab.cluster.config import ClusterParts
from nanopd_lab.cluster.inline import InlineLauncher
from nanopd_lab.cluster.outputs import RequestFailedError
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.transfer.packing import pack_blocks
from nanopd_lab.transfer.registry import Choice
from tests.engine.test_token_identity import prompts
from tests.hf import CONFIGS, assert_same_tokens, greedy, save_tiny

POOL = 1 << 24
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


def inline(model: str, workers: int = 2, policy: Any = "1p1d", **engine: Any) -> Cluster:
    options = {"kv_cache_memory_bytes": POOL, "device": None, **engine}
    options.pop("device")
    return Cluster(
        ClusterConfig(
            model,
            workers=workers,
            policy=policy,
            launcher="inline",
            devices=("cpu",) * workers,
            engine=options,
        )
    )


@pytest.mark.parametrize("policy", ["collocated", "1p1d", "disaggregated", "round-robin", "least-loaded"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_greedy_tokens_are_hugging_faces_on_every_route(
    architecture: str, policy: str, tmp_path: Path
) -> None:
    path = save_tiny(architecture, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batch = prompts([1, 16, 17, 64, 130], shared=20)
    with inline(str(path), policy=policy, max_num_batched_tokens=48) as cluster:
        outputs = cluster.generate(batch, GREEDY, use_tqdm=False)
        cluster.check_integrity()
    for prompt, output in zip(batch, outputs, strict=True):
        assert_same_tokens(hf, prompt, output.outputs[0].token_ids, greedy(hf, prompt, 10))
        (path_report,) = output.paths
        assert path_report.complete
        assert not path_report.problems()
        assert path_report.route is not None
        if policy in ("1p1d", "disaggregated"):
            assert not path_report.route.collocated
            usage = path_report.attempts[-1].decode
            assert usage is not None
            assert usage.received + usage.first_cached == len(prompt)
            assert path_report.transferred_bytes > 0


@pytest.fixture(scope="module")
def one_engine() -> dict[str, Any]:
    """Answers of one engine: greedy, sampled, seeded, several samples, with log-probabilities."""
    batch = prompts([3, 40, 77, 12, 64, 33])
    params = [
        GREEDY,
        SamplingParams(max_tokens=9, temperature=0.8, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=1.2, top_p=0.9, top_k=40, seed=7, n=3, ignore_eos=True),
        SamplingParams(max_tokens=7, temperature=0, logprobs=3, ignore_eos=True),
        SamplingParams(max_tokens=1, temperature=0),
        SamplingParams(max_tokens=8, temperature=0.5, min_p=0.05, ignore_eos=True),
    ]
    llm = LLM("random:tiny", kv_cache_memory_bytes=POOL, device="cpu")
    return {"batch": batch, "params": params, "outputs": llm.generate(batch, params, use_tqdm=False)}


@given(
    policy=st.sampled_from(["collocated", "1p2d", "2p1d", "disaggregated", "round-robin", "least-loaded"]),
    budget=st.sampled_from([5, 16, 31, 64, 512]),
    block_size=st.sampled_from([4, 8, 16]),
    blocks=st.sampled_from([20, 40, 400]),
    ahead=st.booleans(),
    caching=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_route_chunk_and_pool_gives_what_one_engine_gives(
    one_engine: dict[str, Any],
    policy: str,
    budget: int,
    block_size: int,
    blocks: int,
    ahead: bool,
    caching: bool,
) -> None:
    engine = {
        "max_num_batched_tokens": budget,
        "block_size": block_size,
        "kv_cache_memory_bytes": blocks * 16 * 4 * 2 * 2 * 2 * 16,  # in blocks of 16 tokens of the tiny shape
        "async_scheduling": ahead,
        "enable_prefix_caching": caching,
        "max_num_seqs": 4,
    }
    with inline("random:tiny", 3, policy, **engine) as cluster:
        outputs = cluster.generate(one_engine["batch"], one_engine["params"], use_tqdm=False)
        cluster.check_integrity()
    for got, want in zip(outputs, one_engine["outputs"], strict=True):
        assert [o.token_ids for o in got.outputs] == [o.token_ids for o in want.outputs]
        assert not [problem for path in got.paths for problem in path.problems()]
        for mine, theirs in zip(got.outputs, want.outputs, strict=True):
            assert mine.finish_reason == theirs.finish_reason
            assert (mine.logprobs is None) == (theirs.logprobs is None)
            for entry, other in zip(mine.logprobs or [], theirs.logprobs or [], strict=True):
                assert {t: e.rank for t, e in entry.items()} == {t: e.rank for t, e in other.items()}
                assert all(abs(entry[t].logprob - other[t].logprob) < 1e-3 for t in entry)


def test_text_and_stop_strings_are_those_of_one_engine() -> None:
    questions = ["The capital of France is", "Count: one, two, three,", "A poem about the sea:", "1, 2, 3,"]
    params = [
        SamplingParams(max_tokens=12, temperature=0),
        SamplingParams(max_tokens=40, temperature=0, stop=[" six", "."]),
        SamplingParams(max_tokens=16, temperature=0.7, seed=3),
        SamplingParams(max_tokens=20, temperature=0, stop=" 6", min_tokens=18),  # comes before, and is text
    ]
    want = LLM("smollm2", kv_cache_memory_bytes=1 << 28, device="cpu").generate(
        questions, params, use_tqdm=False
    )
    with inline("smollm2", policy="1p1d", kv_cache_memory_bytes=1 << 28) as cluster:
        got = cluster.generate(questions, params, use_tqdm=False)
        answers = cluster.chat(
            [{"role": "user", "content": "Say hi."}], SamplingParams(max_tokens=4), use_tqdm=False
        )
        cluster.check_integrity()
    for mine, theirs in zip(got, want, strict=True):
        assert mine.outputs[0].text == theirs.outputs[0].text
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert (mine.outputs[0].finish_reason, mine.outputs[0].stop_reason) == (
            theirs.outputs[0].finish_reason,
            theirs.outputs[0].stop_reason,
        )
    assert answers[0].outputs[0].text


def test_an_error_names_the_prompt_and_ends_the_others() -> None:
    with inline("random:tiny") as cluster:
        with pytest.raises(InvalidRequestError, match=r"prompt 1: the prompt is empty"):
            cluster.generate([[1, 2], []], GREEDY, use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            cluster.generate("text", GREEDY, use_tqdm=False)
        name = cluster.submit([1, 2, 3], GREEDY, timeout_s=1e-9)
        (last,) = [output for output in cluster.stream([name]) if output.settled]
        assert "deadline passed" in str(last.outputs[0].error)
        cluster.check_integrity()
    with pytest.raises(ValueError, match="closed"):
        cluster.submit([1], GREEDY)


def test_a_request_that_fails_is_an_error_of_generate() -> None:
    config = ClusterConfig("random:tiny", launcher="inline", devices=("cpu", "cpu"), request_timeout_s=1e-9)
    with (
        Cluster(config) as cluster,
        pytest.raises(RequestFailedError, match="prompt 0: the request's deadline"),
    ):
        cluster.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"policy": "2p2d"}, r"needs 2 \+ 2 workers"),
        ({"policy": "fastest"}, "unknown policy 'fastest'"),
        ({"launcher": "threads"}, "launcher is 'threads'"),
        ({"engine": {"model": "x"}}, "setting of the cluster itself"),
        ({"engine": {"blocksize": 4}}, "blocksize"),
        ({"engine": {"block_size": 0}}, "block_size is 0"),
        ({"devices": ("cpu",)}, "1 devices for 2 workers"),
        ({"request_timeout_s": 0}, "request_timeout_s is 0"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**{"model": "random:tiny", "workers": 2, **changes})


@pytest.mark.timeout(60)
def test_a_stream_of_what_is_not_under_way_is_an_error() -> None:
    with inline("random:tiny") as cluster:
        name = cluster.submit([1, 2, 3], GREEDY)
        assert list(cluster.stream([name]))[-1].settled
        for wrong in (name, "nosuch"):
            with pytest.raises(InvalidRequestError, match=f"request '{wrong}' is not under way"):
                list(cluster.stream([wrong]))


def test_requests_come_and_go_while_others_run() -> None:
    with inline("random:tiny", 2, "least-loaded") as cluster:
        names = [cluster.submit(list(range(1, 30)), GREEDY) for _ in range(3)]
        cluster.poll()
        cluster.cancel(names[1])
        late = cluster.submit([5] * 50, GREEDY)
        done = {o.request_id: o for o in cluster.stream([*names, late]) if o.settled}
        assert done[names[1]].outputs[0].finish_reason == "abort"
        assert {len(done[name].outputs[0].token_ids) for name in (names[0], names[2], late)} == {10}
        assert all(view.jobs == 0 for view in cluster.workers())
        cluster.check_integrity()


def test_an_inline_cluster_may_be_left_alone_between_calls() -> None:
    """Its workers are silent then, which says nothing of them."""
    ahead = 0.0
    options = {"kv_cache_memory_bytes": POOL}
    config = ClusterConfig(
        "random:tiny", policy="1p1d", launcher="inline", devices=("cpu",) * 2, engine=options
    )
    with Cluster(config, lambda: time.monotonic() + ahead) as cluster:
        assert isinstance(cluster.launcher, InlineLauncher)
        hosts = dict(cluster.launcher.hosts)
        for _ in range(3):
            (output,) = cluster.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
            assert len(output.paths[0].attempts) == 1
            ahead += 10 * config.limits.heartbeat_s
        assert cluster.launcher.hosts == hosts


def test_it_says_how_kv_moves_and_why() -> None:
    with inline("random:tiny") as cluster:
        assert cluster.transport.name == "inproc"
        assert "all workers are in this process" in cluster.transport.reason
    config = ClusterConfig(
        "random:tiny", launcher="inline", devices=("cpu",) * 2, engine={"kv_cache_memory_bytes": POOL}
    )
    with Cluster(replace(config, transport="shm")) as cluster:
        assert cluster.transport == Choice("shm", "asked for")
    exchanged = ClusterParts(pack=lambda pool, blocks: pack_blocks(pool, blocks))
    with Cluster(replace(config, parts=exchanged)) as cluster:
        assert cluster.transport == Choice("inproc", "parts exchange pack, which only it uses")


def test_without_a_trace_no_step_is_kept() -> None:
    with inline("random:tiny") as cluster:
        for _ in range(2):
            assert cluster.steps() == {"w0": [], "w1": []}
            cluster.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


def test_a_lost_block_is_seen_while_requests_run() -> None:
    with inline("random:tiny") as cluster:
        assert isinstance(cluster.launcher, InlineLauncher)
        cluster.submit([5] * 50, GREEDY)
        allocator = cluster.launcher.hosts["w0"].core.scheduler.allocator
        (lost,) = allocator.allocate(1)
        with pytest.raises(AssertionError, match="w0"):
            cluster.check_integrity()
        allocator.release([lost])
        cluster.check_integrity()


def test_a_batch_that_does_not_fit_the_queue_leaves_nothing_behind() -> None:
    config = ClusterConfig(
        "random:tiny",
        workers=1,
        launcher="inline",
        devices=("cpu",),
        engine={"kv_cache_memory_bytes": POOL},
        limits=Limits(max_queue=2, max_jobs=1),
    )
    with Cluster(config) as cluster:
        with pytest.raises(ClusterBusyError):
            cluster.generate([[5] * 20] * 9, GREEDY, use_tqdm=False)
        ended = cluster.poll(0.5)
        assert len(ended) == 3
        assert all(output.outputs[0].finish_reason == "abort" for output in ended)
        assert cluster.controller.num_unsettled == 0


def test_things_of_another_kind_are_refused_by_name() -> None:
    with inline("random:tiny") as cluster:
        for wrong in ({"max_tokens": 3}, 5, "greedy", [5]):
            with pytest.raises(InvalidRequestError, match=r"sampling_params is .*; give SamplingParams"):
                cluster.generate([[1, 2, 3]], wrong, use_tqdm=False)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="sampling_params is 5"):
            cluster.submit([1, 2, 3], 5)  # type: ignore[arg-type]
        for late in (0, -1, float("nan"), "soon"):
            with pytest.raises(InvalidRequestError, match=r"timeout_s is .*; it must be a positive number"):
                cluster.submit([1, 2, 3], GREEDY, timeout_s=late)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="the workload is 5; make one"):
            cluster.bench(5)  # type: ignore[arg-type]
        workload = random_workload(2, Arrivals(50.0), (Fixed(5), Fixed(3)))
        with pytest.raises(ValueError, match=r"slo is 'ttft:500'; give Slo\(...\)"):
            cluster.bench(workload, slo="ttft:500")  # type: ignore[arg-type]
        assert all(view.jobs == 0 for view in cluster.workers())
