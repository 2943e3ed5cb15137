"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nanopd_lab.cli import main


def test_chat_answers_and_reports(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--device", "cpu", "--max-tokens", "6"]) == 0
    out = capsys.readouterr().out
    for word in (
        "tokens/s",
        "time to first token",
        "time per output token",
        "KV blocks",
        "> What is the capital",
    ):
        assert word in out


def test_generate_prints_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--device", "cpu", "--max-tokens", "2", "The capital of France is"]) == 0
    assert capsys.readouterr().out == "[length] The capital of France is Paris.\n"
    arguments = [
        "generate",
        "--device",
        "cpu",
        "--max-tokens",
        "2",
        "--json",
        "--chat",
        "--logprobs",
        "1",
        "Hi",
    ]
    assert main(arguments) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["finished"] is True
    assert len(row["outputs"][0]["token_ids"]) == 2


def test_info_names_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"torch", "processor", "GPUs", "C++ kernels", "cache folder"} <= set(report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "smollm3", "x"], "smollm2"),
        (["generate", "--model", "random:tiny", "--device", "cpu", "x"], "has no tokenizer"),
        (["generate", "--temperature", "-1", "x"], "temperature is -1.0"),
        (["bench-offline", "--peers", "vllm"], "unknown peers vllm"),
        (["bench-offline", "--min-input-len", "9", "--max-input-len", "3"], "input lengths 9 to 3"),
        (["generate", "--workers", "0", "x"], "workers is 0; it must be an integer"),
        (["simulate", "--workers", "0"], "workers is 0; it must be at least 1"),
        (["simulate", "--policy", "3p1d", "--workers", "1"], "policy='collocated'"),
        (["simulate", "--dataset-name", "azure", "--dataset-path", "none.csv"], "none.csv: No such file"),
        (["simulate", "--dataset-name", "azure", "--dataset-path", "/"], "/: Is a directory"),
        (["simulate", "--result-filename", "no/such/folder.json"], "there is no folder no/such"),
        (["simulate", "--max-num-seqs", "0"], "max_num_seqs is 0; it must be at least 1"),
        (["simulate", "--num-blocks", "0"], "num_blocks is 0; it must be at least 1"),
        (["simulate", "--beat", "0"], "beat_s is 0.0; it must be positive"),
        (["simulate", "--dataset-name", "log-normal", "--input-sigma", "nan"], "sigma nan"),
        (
            ["sweep", "--summary-filename", "no/such/file.json"],
            "--summary-filename no/such/file.json: there is",
        ),
        (["bench", "--model", "random:tiny", "--temperature", "-1"], "temperature is -1.0"),
        (["ceilings", "--device", "nosuch"], "device is 'nosuch'; use cpu"),
        (["ceilings", "--rounds", "0"], "rounds is 0; it must be at least 1"),
        (["bench-handover", "--transports", "pinned"], "workers are on CPUs; choose auto or shm"),
        (["bench", "--model", "random:tiny", "--goodput", "ttft"], "goodput 'ttft'; write ttft:500"),
        (["plan", "--goodput", "ttft:500", "--simulate", "-1"], "--simulate is -1; it must be 0 or more"),
        (["regret", "--policies", "adaptive", "nosuch"], "unknown policy 'nosuch'"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_result_that_cannot_be_written_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "kept.json"
    target.write_text("kept")
    target.chmod(0o400)
    if os.access(target, os.W_OK):
        pytest.skip("root may write what nobody may")
    assert main(["simulate", "--num-prompts", "3", "--result-filename", str(target)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_unknown_flag_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "--dataset-name", "nosuch"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "invalid choice: 'nosuch'" in error
    assert error.endswith("; see nanopd-lab bench --help\n")
    assert error.count("\n") == 1


def test_bench_offline_compares_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "result.json"
    sizes = ["--num-prompts", "3", "--min-input-len", "4", "--max-input-len", "9", "--output-len", "4"]
    peers = ["--peers", "hf-padded", "hf-continuous", "hf-sequential", "--rounds", "1"]
    arguments = ["bench-offline", "--device", "cpu", "--dtype", "float32", *sizes, *peers]
    assert main([*arguments, "--result-filename", str(target)]) == 0
    result = json.loads(target.read_text())
    assert set(result["summary"]) == {"ours", "hf-padded", "hf-continuous", "hf-sequential"}
    assert all(row["output_tokens_per_s"] > 0 for row in result["summary"].values())
    assert {"date", "machine", "versions", "commit", "command"} <= set(result["provenance"])
    assert "ours is" in capsys.readouterr().out
