"""The engine on a GPU: the same tokens in float32, and half precision that is as good as Hugging Face's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanopd_lab import LLM, SamplingParams
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
