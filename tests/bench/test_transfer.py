"""`nanopd-lab transfer`: that it measures and reports what it should; never how fast."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from nanopd_lab.bench import transfer, transfer_pairs
from nanopd_lab.cli import main
from nanopd_lab.transfer.nixl_agent import is_installed


def test_bench_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(transfer, "LINK_BYTES", 1 << 20)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = tmp_path / "record.json"
    between = ["torchdist", "nixl"] if is_installed() else ["torchdist"]
    arguments = [
        "--transports",
        "inproc",
        "shm",
        *between,
        "--shape",
        "tiny-qwen3",
        "--tokens",
        "20",
        "300",
        "--rounds",
        "2",
        "--result-filename",
        str(path),
    ]
    assert main(["transfer", "bench", *arguments]) == 0
    record = json.loads(path.read_text())
    assert record["schema"] == transfer.SCHEMA
    assert record["provenance"]["commit"] is not None or record["provenance"]["date"]
    kinds = {(row["transport"], row["processes"], row["tokens"], row["in_flight"]) for row in record["rows"]}
    expected = {("inproc", 1), ("shm", 1), ("shm", 2), *itertools.product(between, (1, 2))}
    assert kinds == {(*pair, tokens, count) for pair in expected for tokens in (20, 300) for count in (1, 4)}
    assert record["links_gb_s"].keys() == {"1", "2"}
    assert all(row["gb_s"] > 0 and row["fraction_of_link"] > 0 for row in record["rows"])
    assert transfer.table(record) in capsys.readouterr().out


def test_wrong_bytes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LINK_BYTES", 1 << 16)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("nanopd_lab.transfer.inproc.copy_blocks", lambda *_: None)
    with pytest.raises(RuntimeError, match="inproc: the wrong bytes arrived"):
        transfer.bench(["inproc"], [64], "tiny-qwen3", [1], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "gpt-9"], "unknown shape 'gpt-9'; choose from"),
        (
            ["--transports", "pigeon"],
            r"unknown transports ['pigeon']; choose from inproc, shm, p2p, pinned, torchdist, nixl",
        ),
        (["--tokens", "0"], "must be at least 1"),
        (["--processes", "3"], "processes [3] 1 or 2"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["transfer", "bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_explain(capsys: pytest.CaptureFixture) -> None:
    assert main(["transfer", "explain", "--devices", "cpu", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("shm: ")
    assert "between machines: torchdist" in out
    assert ("pip install" in out) == (not is_installed())


def test_pairs_are_measured_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(transfer, "LINK_BYTES", 1 << 18)
    path = tmp_path / "pairs.json"
    words = ["--devices", "cpu", "cpu", "cpu", "--shape", "tiny-qwen3", "--tokens", "40", "--rounds", "1"]
    assert main(["transfer", "pairs", *words, "--result-filename", str(path)]) == 0
    record = json.loads(path.read_text())
    found = {(pair["source"], pair["target"]) for pair in record["pairs"]}
    assert found == {(i, j) for i in range(3) for j in range(3) if i != j}
    for pair in record["pairs"]:
        assert {row["transport"] for row in pair["rows"]} == {"inproc", "shm"}
        assert all(row["gb_s"] > 0 for row in pair["rows"])
    assert transfer_pairs.table(record) in capsys.readouterr().out


def test_one_device_makes_no_pair(capsys: pytest.CaptureFixture) -> None:
    assert main(["transfer", "pairs", "--devices", "cpu"]) == 2
    assert "pairs take two devices at least, and there are 1" in capsys.readouterr().err
