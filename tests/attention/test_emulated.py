"""The emulated CUDA kernels as the attention of a real model."""

from __future__ import annotations

import pytest

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.attention.emulated import EmulatedBackend
from nanopd_lab.engine.config import EngineParts
from nanopd_lab.hostcc import find_compiler
from nanopd_lab.kernels.sources import definition, replaced

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="the emulator needs a C++ compiler")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def answer(backend: EmulatedBackend | None) -> list[int]:
    llm = LLM("smollm2", device="cpu", parts=EngineParts(attention=backend))
    (output,) = llm.chat([QUESTION], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_a_model_answers_the_same_through_the_kernels_and_otherwise_if_one_is_spoilt() -> None:
    backend = EmulatedBackend("split")
    expected = answer(None)
    assert answer(backend) == expected
    assert backend.launches == 3 * 30  # decode steps and layers: the first token comes out of the prompt
    nothing = "template <int WIDTH> DEVICE float group_sum(float x) { return 8 * x; }"
    assert answer(EmulatedBackend("split", replaced(definition("warp.h", "group_sum"), nothing))) != expected
