"""A decoder layer is compiled once for all layers and all batches, and gives the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from nanopd_lab import LLM, SamplingParams, hostcc
from nanopd_lab.attention.cuda import CudaBackend
from nanopd_lab.engine.config import EngineParts
from nanopd_lab.model import inference
from nanopd_lab.model.compilation import compile_model
from nanopd_lab.model.inference import InferenceLinear

PROMPTS = [list(range(1, 40)), [5, 6, 7], list(range(100, 180)), [9]]
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, PARAMS, use_tqdm=False)]


@pytest.mark.slow
@pytest.mark.skipif(hostcc.find_compiler() is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("few_rows", [False, True])
def test_one_compilation_serves_every_layer_and_batch(
    few_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's operators have CPU implementations: the same graph is traced here as on a GPU."""
    plain = LLM("random:tiny-qwen3", device="cpu", kv_cache_memory_bytes=1 << 24)
    monkeypatch.setattr(inference.library, "available", lambda: False)
    llm = LLM(
        "random:tiny-qwen3",
        device="cpu",
        kv_cache_memory_bytes=1 << 24,
        max_num_batched_tokens=32,
        parts=EngineParts(attention=CudaBackend()),
    )
    model: Any = llm.engine.runner.model
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, InferenceLinear(child.weight, child.bias, native=False))
    for module in model.modules():
        if isinstance(module, InferenceLinear):
            module.choose = True
    torch._dynamo.reset()
    counters.clear()
    compile_model(model, "default", few_rows=few_rows)
    assert tokens(llm) == tokens(plain)
    assert tokens(llm, [[3, 1, 4], [1] * 70]) == tokens(plain, [[3, 1, 4], [1] * 70])
    # One graph for the layers and one for the final norm, each perhaps once more for a single row.
    assert counters["stats"]["unique_graphs"] <= 4
    assert not counters["graph_break"]

    compile_model(model, "off")
    compiled = counters["stats"]["unique_graphs"]
    assert tokens(llm) == tokens(plain)
    assert counters["stats"]["unique_graphs"] == compiled


def test_a_residual_is_added_by_the_product() -> None:
    """The graph pass on a graph of its own: both orders, through views, and not where the product has other users."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from nanopd_lab.model.compilation import add_in_products

    def layer(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        linear = torch.ops.nanopd.linear
        shared = linear(x, w)
        return (
            torch.ops.aten.add.Tensor(r, linear(x, w)),
            torch.ops.aten.add.Tensor(torch.ops.aten.view.default(linear(x, w), r.shape), r),
            torch.ops.aten.add.Tensor(r, shared),
            shared,
        )

    x, w, r = torch.randn(2, 32), torch.randn(64, 32), torch.randn(2, 64)
    traced = make_fx(layer)(x, w, r)
    add_in_products()(traced.graph)
    traced.recompile()
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(torch.ops.nanopd.linear_add.default) == 2
    assert targets.count(torch.ops.nanopd.linear.default) == 1
    for found, wanted in zip(traced(x, w, r), layer(x, w, r), strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="compilation is 'fast'; choose one of off, default, tuned"):
        LLM("random:tiny", device="cpu", compilation="fast")
