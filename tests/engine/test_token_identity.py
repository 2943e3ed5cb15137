"""Greedy output equals Hugging Face's, whatever the engine does to get there."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanopd_lab import LLM, BeamSearchParams, SamplingParams
from nanopd_lab.kv.cache import KVShape
from nanopd_lab.model.runner import Launched, ModelRunner
from tests.hf import CONFIGS, VOCAB, assert_same_tokens, greedy, save_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    made = {}
    for architecture in CONFIGS:
        path = save_tiny(architecture, tmp_path_factory.mktemp(architecture))
        made[architecture] = (path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    return made


def prompts(lengths: list[int], seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Random prompts; each begins with the same `shared` tokens (fewer where it is shorter)."""
    rng = random.Random(seed)
    head = [rng.randrange(VOCAB) for _ in range(shared)]
    return [(head + [rng.randrange(VOCAB) for _ in range(length)])[:length] for length in lengths]


@lru_cache(maxsize=512)
def reference(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> list[int]:
    return greedy(model, list(prompt), count)


def run_staggered(
    llm: LLM, batch: list[list[int]], params: SamplingParams, gap: int
) -> list[list[list[int]]]:
    """Add one request every `gap` steps; returns the tokens of each sample of each request."""
    waiting = dict(enumerate(batch))
    out: dict[int, list[list[int]]] = {}
    step = 0
    while waiting or llm.engine.has_unfinished:
        while waiting and (gap == 0 or step % gap == 0):
            number = min(waiting)
            llm.engine.add_request(f"s{number}", waiting.pop(number), params)
            if gap:
                break
        for output in llm.engine.step():
            if output.finished:
                out[int(output.request_id[1:])] = [sample.token_ids for sample in output.outputs]
        llm.engine.check_integrity()
        step += 1
    assert llm.stats().blocks.used == 0
    return [out[number] for number in range(len(batch))]


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("budget", [1, 7, 16, 64, 512])
@pytest.mark.parametrize("caching", [True, False])
def test_every_chunk_size(
    tiny: dict[str, tuple[Path, PreTrainedModel]], architecture: str, budget: int, caching: bool
) -> None:
    path, hf = tiny[architecture]
    batch = prompts([1, 2, 15, 16, 17, 31, 64, 65, 130 if budget < 16 else 700], shared=40)
    llm = LLM(str(path), max_num_batched_tokens=budget, enable_prefix_caching=caching, device="cpu")
    results = run_staggered(llm, batch, GREEDY, gap=2)
    for prompt, (tokens,) in zip(batch, results, strict=True):
        assert_same_tokens(hf, prompt, tokens, reference(hf, tuple(prompt), 12))
    assert (llm.stats().blocks.prefix_hits_total > 0) == caching


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("optimise", [True, False])
def test_every_backend(tiny: dict[str, tuple[Path, PreTrainedModel]], backend: str, optimise: bool) -> None:
    path, hf = tiny["qwen2"]
    batch = prompts([5, 33])
    llm = LLM(
        str(path), attention_backend=backend, optimise=optimise, max_num_batched_tokens=20, device="cpu"
    )
    for prompt, (tokens,) in zip(batch, run_staggered(llm, batch, GREEDY, gap=1), strict=True):
        assert_same_tokens(hf, prompt, tokens, reference(hf, tuple(prompt), 12))


@pytest.mark.parametrize("ahead", [False, True], ids=["simple loop", "ahead"])
@pytest.mark.parametrize("size", [1, 2, 8, 32])
@pytest.mark.parametrize("gap", [0, 1, 3])
def test_batches_that_arrive_at_different_times(
    tiny: dict[str, tuple[Path, PreTrainedModel]], size: int, gap: int, ahead: bool
) -> None:
    path, hf = tiny["llama"]
    rng = random.Random(size)
    batch = prompts([rng.randint(1, 50) for _ in range(size)], seed=size)
    llm = LLM(str(path), max_num_batched_tokens=64, block_size=4, device="cpu", async_scheduling=ahead)
    for prompt, (tokens,) in zip(batch, run_staggered(llm, batch, GREEDY, gap), strict=True):
        assert_same_tokens(hf, prompt, tokens, reference(hf, tuple(prompt), 12))


@pytest.mark.parametrize("ahead", [False, True], ids=["simple loop", "ahead"])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("budget", [5, 64])
def test_preemption_changes_nothing(
    tiny: dict[str, tuple[Path, PreTrainedModel]], caching: bool, budget: int, ahead: bool
) -> None:
    path, hf = tiny["qwen3"]
    batch = prompts([20, 30, 25, 18, 40], shared=8)
    shape = KVShape(3, 2, 16, 4, torch.float32)
    llm = LLM(
        str(path),
        block_size=4,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
        kv_cache_memory_bytes=shape.block_bytes * 30,
        device="cpu",
        async_scheduling=ahead,
    )
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    results = run_staggered(llm, batch, params, gap=0)
    assert llm.stats().preemptions > 0
    for prompt, (tokens,) in zip(batch, results, strict=True):
        assert_same_tokens(hf, prompt, tokens, reference(hf, tuple(prompt), 40))


@pytest.mark.parametrize("ahead", [False, True], ids=["simple loop", "ahead"])
def test_samples_of_one_prompt_share_and_then_part(
    tiny: dict[str, tuple[Path, PreTrainedModel]], ahead: bool
) -> None:
    path, hf = tiny["llama"]
    batch = prompts([21, 16, 3])
    llm = LLM(str(path), max_num_batched_tokens=16, block_size=16, device="cpu", async_scheduling=ahead)
    results = run_staggered(
        llm, batch, SamplingParams(n=4, temperature=0, max_tokens=12, ignore_eos=True), gap=1
    )
    for prompt, samples in zip(batch, results, strict=True):
        for tokens in samples:
            assert_same_tokens(hf, prompt, tokens, reference(hf, tuple(prompt), 12))
    assert llm.stats().blocks.copies_total > 0
    hot = SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=12, ignore_eos=True)
    (samples,) = run_staggered(llm, [batch[0]], hot, gap=0)
    assert len({tuple(tokens) for tokens in samples}) == 4


@pytest.mark.parametrize("ahead", [False, True], ids=["simple loop", "ahead"])
def test_same_seed_same_tokens_whatever_the_batch(
    tiny: dict[str, tuple[Path, PreTrainedModel]], ahead: bool
) -> None:
    path, _ = tiny["qwen3"]
    batch = prompts([9, 30, 4, 17, 25, 8])
    params = SamplingParams(
        temperature=0.8, top_p=0.95, top_k=40, seed=11, max_tokens=16, n=2, ignore_eos=True
    )
    alone = []
    for prompt in batch:
        llm = LLM(str(path), enable_prefix_caching=False, device="cpu", async_scheduling=ahead)
        alone += run_staggered(llm, [prompt], params, gap=0)
    for budget, gap in ((512, 0), (8, 1), (40, 3)):
        llm = LLM(str(path), max_num_batched_tokens=budget, device="cpu", async_scheduling=ahead)
        assert run_staggered(llm, batch, params, gap) == alone


@pytest.mark.parametrize("chunk", [64, 333, 512])
def test_a_long_prompt_in_chunks_gives_the_logits_of_one_pass(
    tiny: dict[str, tuple[Path, PreTrainedModel]], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 2,000 tokens: a chunk that attended only to itself would be far off."""
    path, hf = tiny["llama"]
    (prompt,) = prompts([2300])
    seen: list[torch.Tensor] = []
    execute = ModelRunner.logits
    monkeypatch.setattr(
        ModelRunner, "logits", lambda self, batch: seen.append(execute(self, batch)) or seen[-1]
    )
    llm = LLM(str(path), max_num_batched_tokens=chunk, device="cpu")
    llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    with torch.no_grad():
        one_pass = hf(torch.tensor([prompt])).logits[0, -1]
    # Random weights this large amplify roundings; test_embedded.py holds a trained model to 1e-4 absolute.
    error = (seen[-1][0] - one_pass).abs().max() / one_pass.abs().max()
    assert error.item() < 1e-4


@pytest.mark.parametrize("ahead", [False, True], ids=["simple loop", "ahead"])
@pytest.mark.parametrize("width", [2, 4])
def test_beam_search_finds_hugging_faces_beams(
    tiny: dict[str, tuple[Path, PreTrainedModel]], width: int, ahead: bool
) -> None:
    path, hf = tiny["llama"]
    batch = prompts([6, 19])
    llm = LLM(str(path), max_num_batched_tokens=16, block_size=4, device="cpu", async_scheduling=ahead)
    found = llm.beam_search(
        batch, BeamSearchParams(width, 10, ignore_eos=True, length_penalty=0.0), use_tqdm=False
    )
    for prompt, output in zip(batch, found, strict=True):
        expected = hf.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=10,
            min_new_tokens=10,
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            length_penalty=0.0,
        )
        assert [beam.tokens for beam in output.sequences] == expected.tolist()
        logprobs = hf(torch.tensor([output.sequences[0].tokens])).logits.log_softmax(-1)[0]
        total = sum(
            logprobs[place - 1, output.sequences[0].tokens[place]].item()
            for place in range(len(prompt), len(prompt) + 10)
        )
        assert output.sequences[0].cum_logprob == pytest.approx(total, abs=1e-3)
    assert llm.stats().blocks.used == 0


@pytest.mark.parametrize("ahead", [False, True], ids=["simple loop", "ahead"])
def test_a_step_that_raises_is_repeated(
    tiny: dict[str, tuple[Path, PreTrainedModel]], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    path, hf = tiny["qwen3"]
    batch = prompts([10, 20])
    llm = LLM(str(path), device="cpu", async_scheduling=ahead)
    launch, result, calls = ModelRunner.launch, Launched.result, iter(range(1000))
    planted = []

    def flaky(real: Callable[..., Any], every: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if next(calls) % every == every - 1:
                planted.append(every)
                raise MemoryError("planted")
            return real(*args)

        return run

    # A step that cannot be launched, and one that turns out to have failed when its tokens are awaited.
    monkeypatch.setattr(ModelRunner, "launch", flaky(launch, 3))
    monkeypatch.setattr(Launched, "result", flaky(result, 5))
    for number, prompt in enumerate(batch):
        llm.engine.add_request(str(number), prompt, GREEDY)
    out = {}
    while llm.engine.has_unfinished:
        try:
            for output in llm.engine.step():
                out[output.request_id] = output
        except MemoryError:
            llm.engine.check_integrity()
    for number, prompt in enumerate(batch):
        assert_same_tokens(
            hf, prompt, out[str(number)].outputs[0].token_ids, reference(hf, tuple(prompt), 12)
        )
    assert llm.stats().blocks.used == 0
    assert {3, 5} <= set(planted)
