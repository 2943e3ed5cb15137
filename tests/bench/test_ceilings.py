"""Ceilings are measured, plausible, and survive being written down."""

from __future__ import annotations

import json

import pytest

from nanopd_lab.bench.ceilings import Ceilings, format_ceilings, measure_ceilings, record_of
from nanopd_lab.resources import data_dir


def test_this_machine() -> None:
    found = measure_ceilings("cpu", ["float32"], rounds=2)
    assert 5e8 < found.read_bytes_per_s < 5e12
    assert 5e8 < found.copy_bytes_per_s < 5e12
    assert 1e9 < found.matmul_flops_per_s["float32"] < 1e15
    roof = found.roof("float32")
    assert roof.ridge == found.matmul_flops_per_s["float32"] / found.read_bytes_per_s
    assert "GFLOP/s" in format_ceilings(found)
    record = json.loads(json.dumps(record_of(found)))
    assert Ceilings.from_record(record) == found


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="device is 'meta'"):
        measure_ceilings("meta")
    with pytest.raises(ValueError, match="no data type 'int99'"):
        measure_ceilings("cpu", ["int99"])
    with pytest.raises(ValueError, match="no peak for 'float16'"):
        Ceilings("x", 1.0, 1.0, {"float32": 1.0}).roof("float16")
    with pytest.raises(ValueError, match="schema is None"):
        Ceilings.from_record({})


@pytest.mark.parametrize(
    "file", sorted((data_dir() / "recorded").glob("ceilings-*.json")), ids=lambda f: f.stem
)
def test_records_can_be_read(file) -> None:  # type: ignore[no-untyped-def]
    record = json.loads(file.read_text())
    assert Ceilings.from_record(record).roof("bfloat16").ridge > 1
    assert "nanopd-lab ceilings" in record["provenance"]["command"]
