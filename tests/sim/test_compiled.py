"""The compiled simulator comes to the same results, to the bit; it is the same source."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanopd_lab.sim.compiled import MODULES, compiled_root

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "collocated": ["--workers", "2", "--policy", "collocated"],
    "preempting": ["--workers", "2", "--policy", "least-loaded", "--num-blocks", "300"],
    "handing over": ["--workers", "4", "--policy", "2p2d", "--beat", "0.5"],
    "failing": ["--workers", "3", "--policy", "1p2d", "--kill", "w1@1.5+1", "--kill", "w0@4+0.5"],
    "cached prefixes": ["--workers", "3", "--policy", "adaptive", "--enable-prefix-caching"],
}


def test_what_is_compiled_exists() -> None:
    assert all((ROOT / "nanopd_lab" / f"{name}.py").is_file() for name in MODULES)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("mypyc") is None or find_spec("setuptools") is None or shutil.which("cc") is None,
    reason="no mypyc, setuptools or C compiler",
)
def test_results_are_the_same_to_the_bit(tmp_path: Path) -> None:
    compiled = compiled_root()
    _run(compiled, "import nanopd_lab.engine.scheduler as it; assert not it.__file__.endswith('.py')", [])
    for name, flags in CASES.items():
        results = [_simulated(root, flags, tmp_path / "result.json") for root in (ROOT, compiled)]
        assert results[0] == results[1], name
    rows = [_fleet(root, tmp_path / f"fleet {root.name}.json") for root in (ROOT, compiled)]
    assert rows[0] == rows[1]


def _fleet(root: Path, target: Path) -> list[dict[str, object]]:
    """Figures of a fleet of two shards, on a network that is full, with workers and a controller that die."""
    flags = [
        "--workers",
        "32",
        "--shards",
        "2",
        "--policies",
        "half",
        "--request-rates",
        "5",
        "--seconds",
        "1",
    ]
    more = [
        "--nic-gbit",
        "50",
        "--accelerate",
        "1e7",
        "--controller-dies",
        "0.5",
        "0.3",
        "--instant",
        "--jobs",
        "1",
    ]
    code = "import sys; from nanopd_lab.cli import main; sys.exit(main())"
    _run(root, code, ["simulate-fleet", *flags, *more, "--result-filename", str(target)])
    rows: list[dict[str, object]] = json.loads(target.read_text())["parts"]["fleet"]["rows"]
    assert all(row["lost_tokens"] and row.pop("cpu_s") for row in rows)
    return rows


def _simulated(root: Path, flags: list[str], target: Path) -> dict[str, object]:
    """Every figure and every request's times."""
    fixed = [
        "--num-prompts",
        "150",
        "--request-rate",
        "20",
        "--dataset-name",
        "azure-like",
        "--save-detailed",
    ]
    code = "import sys; from nanopd_lab.cli import main; sys.exit(main())"
    _run(root, code, ["simulate", *fixed, *flags, "--result-filename", str(target)])
    record: dict[str, object] = json.loads(target.read_text())
    assert record["completed"]
    return {key: value for key, value in record.items() if key not in ("provenance", "date")}


def _run(root: Path, code: str, flags: list[str]) -> None:
    """With the package in `root`, which is the working directory too: Python looks there first."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code, *flags], cwd=root, env=environment, check=True)
