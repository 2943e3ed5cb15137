"""When cuDNN plans a new length, and that both kernels agree."""

from __future__ import annotations

import pytest
import torch

from nanopd_lab.attention import cuda
from nanopd_lab.attention.cuda import PLAN_PAIRS, Plans, attend_known


def test_lengths_that_never_come_again_are_never_planned() -> None:
    plans, layers = Plans(), 36
    assert not any(plans.pays(length) for length in range(512, 2049) for _ in range(layers))


@pytest.mark.parametrize("length", [512, 2048, 8192, 100_000])
def test_a_length_is_planned_once_it_has_lost_what_a_plan_costs(length: int) -> None:
    plans = Plans()
    calls = next(call for call in range(1, 1_000_000) if plans.pays(length))
    pairs = length * length // 2
    assert (calls - 1) * pairs <= PLAN_PAIRS < calls * pairs
    assert plans.pays(length)
    assert not plans.pays(511)


@pytest.mark.gpu
@pytest.mark.parametrize("planned", [False, True])
def test_a_prompt_alone_is_right_by_either_kernel(planned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "PLAN_PAIRS", 0 if planned else float("inf"))
    torch.manual_seed(0)
    tokens, heads, kv_heads, dim = 777, 8, 2, 128
    query, key, value = (
        torch.randn(tokens + 3, n, dim, device="cuda", dtype=torch.bfloat16)
        for n in (heads, kv_heads, kv_heads)
    )
    blocks = -(-tokens // 16)
    pool = torch.zeros(blocks, 2, kv_heads, 16, dim, device="cuda", dtype=torch.bfloat16)
    out = attend_known(
        query,
        pool,
        torch.tensor([0, tokens], dtype=torch.int32, device="cuda"),
        torch.tensor([tokens], dtype=torch.int32, device="cuda"),
        torch.arange(blocks, dtype=torch.int32, device="cuda")[None],
        torch.empty(0, device="cuda"),
        [tokens],
        [tokens],
        dim**-0.5,
        fresh=(key, value),
    )
    q, k, v = (x[:tokens].transpose(0, 1)[None].double() for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(out[:tokens].double(), expected[0].transpose(0, 1), atol=2e-2)
