"""The counts are right: by hand, against torch's FLOP counter on the real engine, and against real weights."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from nanopd_lab import LLM
from nanopd_lab.core import Chunk, Request, SamplingParams, Sequence
from nanopd_lab.cost.roofline import (
    ChunkShape,
    ModelDims,
    Roof,
    arithmetic_intensity,
    step_cost,
    step_flops,
    time_per_output_token,
)
from nanopd_lab.kv import blocks_for
from nanopd_lab.model.batch import order
from nanopd_lab.model.shapes import SHAPES, shape_config

TOY = ModelDims("toy", 2, 4, 8, 2, 1, 2, 10, True, 4, 4)
QWEN = ModelDims.from_config(shape_config("qwen3-8b"), name="qwen3-8b", weight_itemsize=2)


def test_a_decode_step_by_hand() -> None:
    cost = step_cost(TOY, [ChunkShape(1, past=3)])
    assert (TOY.layer_weights, TOY.token_weights, TOY.vocab_weights) == (144, 288, 40)
    assert cost.gemm_flops == 2 * 288 + 2 * 40
    assert cost.attention_flops == 4 * 2 * 2 * (2 * 2 + 2 * 2)
    assert cost.weight_bytes == 4 * (288 + 40) == TOY.weight_bytes
    assert TOY.kv_bytes_per_token == 32
    assert (cost.kv_read_bytes, cost.kv_write_bytes) == (4 * 32, 32)
    # In and out of q, k, v: 4 + 8; o: 4 + 4; gate, up: 4 + 16; down: 8 + 4. The row looked up, the logits.
    assert cost.activation_bytes == 4 * (2 * (12 + 8 + 20 + 12) + 4 + (4 + 10))
    assert cost.intensity == cost.flops / cost.bytes == arithmetic_intensity(TOY, [ChunkShape(1, 3)])


def test_a_prompt_in_chunks_has_the_flops_of_the_whole() -> None:
    whole = step_cost(TOY, [ChunkShape(10)])
    parts = [step_cost(TOY, [c]) for c in (ChunkShape(3, 0, 0), ChunkShape(4, 3, 0), ChunkShape(3, 7))]
    for field in ("tokens", "gemm_flops", "attention_flops", "kv_write_bytes", "activation_bytes"):
        assert sum(getattr(part, field) for part in parts) == getattr(whole, field)
    # What chunking costs: weights and the past are read again.
    assert sum(part.weight_bytes for part in parts) == 4 * (3 * 288 + 40)
    assert sum(part.kv_read_bytes for part in parts) == (3 + 7 + 10) * 32


def test_published_numbers_of_qwen3_8b() -> None:
    assert QWEN.kv_bytes_per_token == 147_456
    assert QWEN.weight_bytes == pytest.approx(16.4e9, rel=0.01)
    # What a step reads: without the embedding table, of which only rows are looked up (15.1 GB).
    assert step_cost(QWEN, [ChunkShape(1, 512)]).weight_bytes == pytest.approx(15.1e9, rel=0.01)
    h100 = Roof(2955e9, 749e12)
    assert time_per_output_token(QWEN, [0], h100) == pytest.approx(5.12e-3, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_every_shape(shape: str) -> None:
    config = shape_config(shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dims = ModelDims.from_config(config, weight_itemsize=2)
    real = sum(p.nbytes for p in model.parameters())
    # Norms and biases are left out; they are small, in the tiny models less so.
    assert dims.weight_bytes == pytest.approx(real, rel=0.01 if "tiny" in shape else 0.001)
    assert dims.weight_bytes <= real


@pytest.mark.parametrize("model", ["random:tiny", "random:tiny-qwen3", "smollm2"])
@pytest.mark.parametrize(
    "shapes",
    [
        [ChunkShape(1, past=40)],
        [ChunkShape(33)],
        [ChunkShape(1, past=7), ChunkShape(1, past=90), ChunkShape(20, past=15)],
        [ChunkShape(12, past=4, samples=0)],
        [ChunkShape(1, past=30), ChunkShape(9, past=16, samples=0)],
    ],
)
def test_flops_are_what_torch_counts_in_the_engine(model: str, shapes: list[ChunkShape]) -> None:
    engine = _engine(model).engine
    dims = _dims(engine)
    chunks, next_block = [], 0
    for number, shape in enumerate(shapes):
        end = shape.past + shape.count
        blocks = list(range(next_block, next_block + blocks_for(end, 16)))
        next_block += len(blocks)
        sequence = Sequence(Request(str(number), [5] * end, SamplingParams()), num_computed=shape.past)
        sequence.blocks = blocks
        chunks.append(Chunk(sequence, shape.past, shape.count, shape.samples))
    with FlopCounterMode(display=False) as counter:
        engine.runner.logits(order(chunks))
    # The dense oracle multiplies behind the causal mask too.
    hidden = sum(s.count * (s.past + s.count) - s.pairs for s in shapes)
    behind = hidden * dims.num_layers * dims.num_heads * 4 * dims.head_dim
    assert counter.get_total_flops() == step_flops(dims, shapes) + behind


_engines: dict[str, LLM] = {}


def _engine(model: str) -> LLM:
    """Plain modules, so that torch sees every product."""
    if model not in _engines:
        options = {"optimise": False, "attention_backend": "reference", "kv_cache_memory_bytes": 1 << 25}
        _engines[model] = LLM(model, device="cpu", **options)  # type: ignore[arg-type]
    return _engines[model]


def _dims(engine) -> ModelDims:  # type: ignore[no-untyped-def]
    return ModelDims.from_config(engine.loaded.model.config, weight_itemsize=4)


def test_it_agrees_with_the_engine_about_bytes() -> None:
    engine = _engine("smollm2").engine
    dims = _dims(engine)
    assert dims.kv_bytes_per_token == engine.cache.shape.token_bytes
    assert dims.weight_bytes == pytest.approx(engine.loaded.geometry.weight_bytes, rel=1e-3)


def test_decode_meets_the_ridge_where_it_should() -> None:
    roof = Roof(bandwidth_bytes_per_s=100.0, peak_flops_per_s=500.0)
    assert roof.ridge == 5
    assert roof.flops_per_s(3) == 300
    assert roof.flops_per_s(50) == 500
    assert roof.raised(Roof(50.0, 700.0)) == Roof(100.0, 700.0)
    below, above = step_cost(TOY, [ChunkShape(1)]), step_cost(TOY, [ChunkShape(200)])
    assert below.intensity < 5 < above.intensity
    assert roof.seconds(below) == below.bytes / 100
    assert roof.seconds(above) == above.flops / 500


@pytest.mark.parametrize("chunks", [[], [ChunkShape(0)], [ChunkShape(1, -1)]])
def test_a_step_without_work_is_refused(chunks: list[ChunkShape]) -> None:
    with pytest.raises(ValueError, match="a step is one chunk or more"):
        step_cost(TOY, chunks)


def test_bad_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="num_layers is 0"):
        replace(TOY, num_layers=0)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        replace(TOY, num_heads=3, num_kv_heads=2)


def test_counting_needs_no_torch() -> None:
    code = "import sys, nanopd_lab.cost.roofline; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
