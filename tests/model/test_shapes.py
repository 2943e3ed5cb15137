"""Random models: seeded, finite, varied, and built without a second copy."""

from __future__ import annotations

import time

import pytest
import torch

from nanopd_lab.model.loading import load_model
from nanopd_lab.model.shapes import SHAPES, shape_config
from nanopd_lab.model.support import UnknownModelError, check_supported
from tests.model.conftest import load

TINY = [name for name in SHAPES if name.startswith("tiny")]

# Published parameter counts (in billions, with embeddings).
FULL_SIZES = {"qwen3-8b": 8.19, "qwen3-0.6b": 0.596, "qwen2-1.5b": 1.54}


@pytest.mark.parametrize("shape", TINY)
def test_same_seed_same_weights_other_seed_other_weights(shape: str) -> None:
    first, again, other = (dict(load(f"random:{shape}", seed=s).model.named_parameters()) for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", TINY)
def test_logits_are_finite_and_greedy_output_varies(shape: str, dtype: torch.dtype) -> None:
    loaded = load(f"random:{shape}", dtype)
    prompt = torch.randint(0, loaded.geometry.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded.model(prompt).logits.float()
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 5.0
    # A model that repeats its input, or one token, would hide errors of position and of cache.
    best = logits.argmax(-1)[0]
    assert len(set(best.tolist())) > 10
    assert (best == prompt[0]).float().mean() < 0.5


@pytest.mark.parametrize("shape", TINY)
def test_a_random_model_has_no_tokenizer_no_folder_and_no_stop_tokens(shape: str) -> None:
    loaded = load(f"random:{shape}")
    assert (loaded.tokenizer, loaded.path, loaded.eos_token_ids) == (None, None, frozenset())
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_tied_weights_stay_one_tensor() -> None:
    model = load("random:tiny-llama").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = load("random:tiny").model
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@pytest.mark.parametrize("shape", FULL_SIZES)
def test_full_shapes_have_the_published_number_of_parameters(shape: str) -> None:
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape_config(shape))
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx(FULL_SIZES[shape], rel=0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_supported(shape: str) -> None:
    check_supported(shape_config(shape).to_dict(), shape)


def test_unknown_shape_is_refused_with_the_names() -> None:
    with pytest.raises(UnknownModelError, match=r"'random:qwen9'.*qwen3-8b"):
        load("random:qwen9")


@pytest.mark.gpu
def test_eight_billion_parameters_on_a_gpu_in_seconds_and_once() -> None:
    device, prompt = torch.device("cuda"), torch.arange(64)[None].cuda()
    seen = []
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        loaded = load_model(
            "random:qwen3-8b", dtype=torch.bfloat16, device=device, seed=3, attn_implementation="sdpa"
        )
        torch.cuda.synchronize()
        assert time.perf_counter() - began < 30.0
        assert torch.cuda.max_memory_allocated() - before < 1.05 * loaded.geometry.weight_bytes
        with torch.no_grad():
            seen.append(loaded.model(prompt).logits)
        del loaded
    assert seen[0].isfinite().all()
    assert torch.equal(seen[0], seen[1])
