"""Hugging Face as the oracle: tiny models on disk, greedy generation, and what to do about ties."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 500
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.4,  # large, so that greedy output wanders and attention matters
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_SIZES, head_dim=64),
    "qwen2": Qwen2Config(**_SIZES, use_sliding_window=False),
    "qwen3": Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SIZES, head_dim=16, sliding_window=None),
}


def save_tiny(architecture: str, folder: Path) -> Path:
    """A seeded random model of the architecture, saved in Hugging Face's layout."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture], dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)  # zero by default, which would hide a lost bias
    model.save_pretrained(folder)
    return folder


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Hugging Face's greedy continuation, `count` tokens."""
    settings = copy.deepcopy(model.generation_config)
    # No stop token; `min_new_tokens` would do that by forbidding it, which is not the same.
    settings.update(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    out = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        generation_config=settings,
    )
    return out[0, len(prompt) :].tolist()


def assert_same_tokens(model: PreTrainedModel, prompt: list[int], got: list[int], want: list[int]) -> None:
    """Equal, or different from a place on where two logits tie within 1e-4."""
    assert len(got) == len(want)
    for place, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        if ours != theirs:
            with torch.no_grad():
                ids = torch.tensor([prompt + want[:place]], device=model.device)
                logits = model(ids).logits[0, -1]
            gap = (logits[theirs] - logits[ours]).item()
            assert abs(gap) < 1e-4, (
                f"token {place} is {ours}, Hugging Face says {theirs} (logits differ by {gap})"
            )
            return
