"""The GPU bench: its workloads, limits and table, as far as no GPU is needed."""

from __future__ import annotations

import json

import pytest
import torch

from nanopd_lab.bench.breakdown import kind_of
from nanopd_lab.bench.engine import WORKLOADS, format_engine, limits, run_engine
from nanopd_lab.cost.roofline import ModelDims
from nanopd_lab.model.shapes import shape_config
from nanopd_lab.resources import data_dir


def test_the_workloads_are_those_that_others_were_measured_with() -> None:
    prompts, outputs = WORKLOADS["256"]()
    assert (sum(map(len, prompts)), sum(outputs)) == (142_827, 133_966)
    prompts, outputs = WORKLOADS["64"]()
    assert len(prompts) == 64
    assert set(outputs) == {128}
    assert all(100 <= len(prompt) <= 1024 for prompt in prompts)


def test_the_limit_of_a_decode_step_is_its_bytes() -> None:
    dims = ModelDims.from_config(shape_config("qwen3-8b"), weight_itemsize=2)
    found = limits(dims, 3e12, 8e14, (1, 64), 512, (2048,))
    # 15.1 GB of weights; 147,456 bytes of KV a token.
    assert found["decode_1"] == pytest.approx((15.14e9 + 512 * 147_456) / 3e9, rel=0.01)
    assert found["decode_64"] == pytest.approx((15.14e9 + 64 * 512 * 147_456) / 3e9, rel=0.02)
    assert found["ttft_2048"] == pytest.approx(2 * 6.95e9 * 2048 / 8e11, rel=0.06)


def test_a_record_reads_as_a_table() -> None:
    record = json.loads((data_dir() / "recorded/engine-qwen3-8b-nvidia-h100-2026-11-25.json").read_text())
    table = format_engine(record)
    for words in ("decode_64", "eager", "limit", "tok/s", "generate_batch", "start-up"):
        assert words in table


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("paged_decode_mma", "attention"),
        ("kv_store", "attention"),
        ("nvjet_sm90_tst_192x64", "products"),
        ("few_rows", "products"),
        ("some_rows", "products"),
        ("triton_poi_fused_mul_silu", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown 'fast'; modes are eager, off, default, tuned"):
        run_engine(modes=["fast"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="bench-engine measures a GPU, and torch sees none"):
            run_engine()
