"""The embedded chat model, as a user meets it, against Hugging Face on the same folder."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.model.runner import ModelRunner
from nanopd_lab.resources import data_dir
from tests.hf import assert_same_tokens, greedy

PROMPTS = json.loads((data_dir() / "prompts.json").read_text())


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", device="cpu")


@pytest.fixture(scope="module")
def hf(llm: LLM) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(llm.model_path, dtype=torch.float32)


def test_answers_are_hugging_faces(llm: LLM, hf: PreTrainedModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    outputs = llm.generate(PROMPTS["completion"] + PROMPTS["chat"], params, use_tqdm=False)
    for output in outputs:
        want = greedy(hf, output.prompt_token_ids, 24)
        assert_same_tokens(hf, output.prompt_token_ids, output.outputs[0].token_ids, want)
    assert llm.stats().blocks.used == 0


@pytest.mark.parametrize("budget", [16, 200])
def test_small_chunks_change_nothing(hf: PreTrainedModel, budget: int) -> None:
    llm = LLM("smollm2", device="cpu", max_num_batched_tokens=budget, block_size=8)
    conversations = [[{"role": "user", "content": text}] for text in PROMPTS["chat"][-3:]]
    outputs = llm.chat(
        conversations, SamplingParams(temperature=0, max_tokens=10, ignore_eos=True), use_tqdm=False
    )
    for output in outputs:
        want = greedy(hf, output.prompt_token_ids, 10)
        assert_same_tokens(hf, output.prompt_token_ids, output.outputs[0].token_ids, want)


def test_a_prompt_of_2000_tokens_in_chunks_gives_the_logits_of_one_pass(
    llm: LLM, hf: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer(" ".join(PROMPTS["chat"]) * 8)["input_ids"][:2200]
    assert len(ids) == 2200
    seen: list[torch.Tensor] = []
    logits = ModelRunner.logits
    monkeypatch.setattr(
        ModelRunner, "logits", lambda self, batch: seen.append(logits(self, batch)) or seen[-1]
    )
    llm.generate([ids], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    with torch.no_grad():
        one_pass = hf(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    assert (seen[-1][0] - one_pass).abs().max().item() <= 1e-4


def test_chat_ends_at_the_stop_token_and_text_has_no_special_tokens(llm: LLM) -> None:
    (output,) = llm.chat(
        [{"role": "user", "content": "What is 2+2? Answer with one number."}],
        SamplingParams(temperature=0, max_tokens=100),
        use_tqdm=False,
    )
    sample = output.outputs[0]
    assert sample.finish_reason == "stop"
    assert sample.token_ids[-1] in llm.engine.loaded.eos_token_ids
    assert "<|im" not in sample.text
    assert "4" in sample.text
    assert output.prompt is not None
    assert output.prompt.endswith("<|im_start|>assistant\n")


def test_text_is_the_tokenizers_own_decoding(llm: LLM) -> None:
    params = SamplingParams(n=2, temperature=1.2, seed=4, max_tokens=60, ignore_eos=True)
    for output in llm.generate(PROMPTS["completion"], params, use_tqdm=False):
        for sample in output.outputs:
            decode = llm.get_tokenizer().decode
            whole = decode(output.prompt_token_ids + sample.token_ids, skip_special_tokens=True)
            assert output.prompt is not None
            assert output.prompt + sample.text == whole


def test_bfloat16_is_as_close_to_float32_as_hugging_faces(
    hf: PreTrainedModel, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two correct bf16 implementations differ in their argmax; their distance to float32 must not."""
    seen: list[torch.Tensor] = []
    logits = ModelRunner.logits
    monkeypatch.setattr(
        ModelRunner, "logits", lambda self, batch: seen.append(logits(self, batch)) or seen[-1]
    )
    half = LLM("smollm2", dtype="bfloat16", device="cpu", max_num_batched_tokens=64)
    theirs = AutoModelForCausalLM.from_pretrained(llm.model_path, dtype=torch.bfloat16)
    text = llm.get_tokenizer()(" ".join(PROMPTS["chat"]))["input_ids"]
    rng = random.Random(0)
    ours_error, theirs_error = [], []
    for _ in range(40):  # single prompts scatter by a factor of two
        length = rng.randint(5, 60)
        start = rng.randrange(len(text) - length)
        ids = text[start : start + length]
        half.generate([ids], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        with torch.no_grad():
            exact = hf(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
            other = theirs(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()
        ours_error.append((seen[-1][0].float() - exact).norm().item())
        theirs_error.append((other - exact).norm().item())
    assert sum(ours_error) < 1.2 * sum(theirs_error)
