"""The engine on a GPU: the same tokens in float32, and half precision that is as good as Hugging Face's."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.core import Chunk, Request, Sequence
from nanopd_lab.model import graphs
from nanopd_lab.model.runner import ModelRunner
from tests.engine.test_token_identity import GREEDY, prompts, run_staggered
from tests.hf import CONFIGS, assert_same_tokens, greedy, save_tiny

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("budget", [7, 64, 512])
def test_greedy_tokens_are_hugging_faces(architecture: str, budget: int, tmp_path: Path) -> None:
    path = save_tiny(architecture, tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
    batch = prompts([1, 16, 17, 64, 130, 300], shared=20)
    llm = LLM(str(path), max_num_batched_tokens=budget, device="cuda", kv_cache_memory_bytes=1 << 26)
    for prompt, (tokens,) in zip(batch, run_staggered(llm, batch, GREEDY, gap=2), strict=True):
        assert_same_tokens(hf, prompt, tokens, greedy(hf, prompt, 12))


def test_sampled_tokens_are_those_of_the_cpu(tmp_path: Path) -> None:
    path = save_tiny("qwen3", tmp_path)
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=30, seed=5, max_tokens=12, n=2, ignore_eos=True)
    batch = prompts([5, 40, 12])
    results = [
        run_staggered(LLM(str(path), device=device, kv_cache_memory_bytes=1 << 26), batch, params, gap=1)
        for device in ("cpu", "cuda")
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_hugging_faces(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_tiny("llama", tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).cuda()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).cuda()
    seen: list[torch.Tensor] = []
    logits = ModelRunner.logits
    monkeypatch.setattr(
        ModelRunner, "logits", lambda self, batch: seen.append(logits(self, batch)) or seen[-1]
    )
    llm = LLM(
        str(path), dtype=str(dtype), device="cuda", kv_cache_memory_bytes=1 << 26, max_num_batched_tokens=32
    )
    ours_error = theirs_error = 0.0
    for seed in range(20):
        (prompt,) = prompts([10 + 7 * seed], seed=seed)
        llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
        with torch.no_grad():
            ids = torch.tensor([prompt], device="cuda")
            want, other = exact(ids).logits[0, -1], theirs(ids).logits[0, -1].float()
        ours_error += (seen[-1][0].float() - want).norm().item()
        theirs_error += (other - want).norm().item()
    assert ours_error < 1.25 * theirs_error


def test_the_embedded_shape_with_random_weights_runs_in_bfloat16() -> None:
    llm = LLM("random:qwen3-0.6b", dtype="bfloat16", device="cuda", max_num_batched_tokens=2048)
    batch = prompts([600, 30, 1500])
    outputs = llm.generate(
        batch, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), use_tqdm=False
    )
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 8, 8]
    llm.engine.check_integrity()


def greedy_tokens(model: str, batch: list[list[int]], **options: Any) -> list[list[int]]:
    options = {"device": "cuda", "kv_cache_memory_bytes": 1 << 28, "enable_prefix_caching": False, **options}
    llm = LLM(model, **options)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(batch, params, use_tqdm=False)
    llm.engine.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


MODES: dict[str, dict[str, Any]] = {
    "simple loop": {"async_scheduling": False, "cuda_graphs": False},
    "ahead": {"cuda_graphs": False},
    "graphs": {},
    "compiled": {"compilation": "default"},
    "compiled, launched": {"compilation": "default", "cuda_graphs": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_tokens_in_float32(mode: str) -> None:
    batch = prompts([1, 16, 17, 64, 130, 300, 5, 80], shared=20)
    options = {"max_num_batched_tokens": 128, "max_num_seqs": 8}
    plain = greedy_tokens("random:tiny-gpu", batch, cuda_graphs=False, optimise=False, **options)
    assert greedy_tokens("random:tiny-gpu", batch, **options, **MODES[mode]) == plain
    alone = [greedy_tokens("random:tiny-gpu", [prompt], **options, **MODES[mode])[0] for prompt in batch[:3]]
    assert alone == plain[:3]


@pytest.mark.parametrize("launch_products", [graphs.LAUNCH_PRODUCTS, 0.0], ids=["whole", "in pieces"])
@pytest.mark.parametrize("options", [{}, {"compilation": "default"}], ids=["graphs", "compiled"])
def test_captured_steps_in_half_precision_are_as_close_as_launched_ones(
    options: dict[str, Any], launch_products: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of all kinds: decodes of 1 to 30 sequences, mixed ones whole and in pieces, and too large for a graph."""
    monkeypatch.setattr(graphs, "LAUNCH_PRODUCTS", launch_products)
    seen: list[torch.Tensor] = []
    logits = ModelRunner.logits
    monkeypatch.setattr(
        ModelRunner, "logits", lambda self, chunks: seen.append(logits(self, chunks)) or seen[-1]
    )

    def run(dtype: str, **more: Any) -> torch.Tensor:
        seen.clear()
        llm = LLM("random:tiny-gpu", dtype=dtype, device="cuda", max_num_batched_tokens=2600, max_num_seqs=30,
                  kv_cache_memory_bytes=1 << 28, async_scheduling=False, **more)  # fmt: skip
        seen.clear()
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        for lengths in ([5], [40], [300], [700, 30], [1900], [2500], [3] * 30, [9] * 13):
            llm.generate(prompts(lengths), params, use_tqdm=False)
        # Each workload's first step: the later ones follow tokens that may differ.
        firsts, left = [], iter(seen)
        for count in (1, 1, 1, 2, 1, 1, 30, 13):
            step = next(left)
            while len(step) != count:
                step = next(left)
            firsts.append(step.float().cpu().clone())
            next(left)
        return torch.cat(firsts)

    exact = run("float32", cuda_graphs=False, optimise=False)
    launched = run("bfloat16", cuda_graphs=False, optimise=False)
    captured = run("bfloat16", **options)
    assert (captured - exact).norm() < 1.3 * (launched - exact).norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_second_gpu_gives_the_tokens_of_the_first(dtype: str) -> None:
    batch = prompts([1, 40, 300, 16])
    params = SamplingParams(temperature=0.7, seed=1, top_p=0.9, max_tokens=40, ignore_eos=True)
    found = []
    for device in ("cuda:0", "cuda:1"):
        llm = LLM("random:tiny-gpu", dtype=dtype, device=device, kv_cache_memory_bytes=1 << 28)
        found.append([output.outputs[0].token_ids for output in llm.generate(batch, params, use_tqdm=False)])
    assert found[0] == found[1]


OTHER = pytest.param(
    "cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
)


@pytest.mark.parametrize("device", ["cuda:0", OTHER])
def test_an_engine_that_is_garbage_does_not_break_the_captures_of_the_next(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, captured = ModelRunner.hidden, []

    def collecting(self: ModelRunner, *args: Any) -> torch.Tensor:
        """Python's collector, wherever it is on, comes at the worst time."""
        if torch.cuda.is_current_stream_capturing():
            captured.append(gc.isenabled() and gc.collect())
        return hidden(self, *args)

    gc.collect()
    gc.disable()
    try:
        # An engine is a cycle: it still lies there when the next one starts.
        greedy_tokens("random:tiny-gpu", prompts([5]), dtype="bfloat16", device=device)
        monkeypatch.setattr(ModelRunner, "hidden", collecting)
        gc.enable()
        (tokens,) = greedy_tokens("random:tiny-gpu", prompts([5]), dtype="bfloat16")
    finally:
        gc.enable()
    assert captured
    assert not any(captured)
    assert len(tokens) == 12


def test_a_long_past_takes_pieces_and_a_short_one_the_whole_step() -> None:
    llm = LLM(
        "random:qwen3-0.6b", dtype="bfloat16", device="cuda", max_num_batched_tokens=2048, max_model_len=24000
    )
    captured = llm.engine.runner.graphs
    assert captured is not None
    (prompt,) = prompts([1000])
    sequence = Sequence(Request("a", prompt, SamplingParams()))
    short, long = (captured.find((Chunk(sequence, past, 1000, 1),)) for past in (0, 20_000))
    assert isinstance(short.replay, graphs.WholeStep)
    assert isinstance(long.replay, graphs.StepInPieces)


def test_the_pool_is_what_the_step_leaves() -> None:
    share = 0.5
    llm = LLM("random:qwen3-0.6b", dtype="bfloat16", device="cuda", gpu_memory_utilization=share)
    total = torch.cuda.mem_get_info()[1]
    used = torch.cuda.memory_reserved()
    assert llm.engine.cache.num_bytes > 0.3 * total
    assert used < (share + 0.05) * total


def test_no_room_for_a_pool_says_what_to_lower() -> None:
    with pytest.raises(
        ValueError, match=r"gpu_memory_utilization = 0.001 of .* leaves no room for the KV pool"
    ):
        LLM("random:qwen3-0.6b", dtype="bfloat16", device="cuda", gpu_memory_utilization=0.001)
