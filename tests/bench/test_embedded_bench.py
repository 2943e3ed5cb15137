"""The benchmark on the embedded model: the outputs are those that the model gives anyway."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.cli import main
from nanopd_lab.resources import data_dir


def test_prompts_of_the_package_are_answered_as_by_one_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    arguments = [
        "bench", "--model", "smollm2", "--launcher", "inline", "--policy", "1p1d", "--dataset-name", "prompts",
        "--num-prompts", "4", "--prompts-output-len", "10", "--request-rate", "100", "--num-warmups", "0",
        "--kv-cache-memory-bytes", str(1 << 27), "--device", "cpu", "--save-detailed", "--result-filename", str(path),
    ]  # fmt: skip
    assert main(arguments) == 0
    record = json.loads(path.read_text())
    questions = json.loads((data_dir() / "prompts.json").read_text())["chat"][:4]
    llm = LLM("smollm2", device="cpu", kv_cache_memory_bytes=1 << 27)
    outputs = llm.chat(
        [[{"role": "user", "content": question}] for question in questions],
        SamplingParams(temperature=0, max_tokens=10),
        use_tqdm=False,
    )
    assert record["generated_texts"] == [output.outputs[0].text for output in outputs]
    assert record["output_lens"] == [len(output.outputs[0].token_ids) for output in outputs]
    assert record["input_lens"] == [len(output.prompt_token_ids) for output in outputs]
    assert min(record["output_lens"]) < 10  # one ended by itself
    assert record["tokenizer_id"] == "smollm2"
    assert record["pd"]["disaggregated"] == 4
    assert "4 of 4 completed" in capsys.readouterr().out
