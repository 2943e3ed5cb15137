"""What README promises: its files exist, its commands are known, and its code runs."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab.cli import build_parser
from nanopd_lab.router import Role
from nanopd_lab.sim import ConstantTime, LinkModel, SimConfig, SimRequest, Simulator

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "data/recorded/README.md"
MANY = ROOT / "MANY_MACHINES.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("document", [ROOT / "README.md", RESULTS, MANY], ids=["README", "results", "many"])
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("document", "least"),
    [(ROOT / "README.md", 9), (RESULTS, 9), (MANY, 2)],
    ids=["README", "results", "many"],
)
def test_records_that_are_named_exist(document: Path, least: int) -> None:
    text = document.read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:[a-z]+)-[\w.*-]*\*[\w.*-]*|[a-z]+-[\w.-]+\.jsonl?)`", text))
    folder = ROOT / "data/recorded"
    assert len(names) >= least
    assert sorted(name for name in names if not list(folder.glob(name))) == []


def test_every_notebook_is_on_the_map() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{path.name})" in README


def test_commands_are_known() -> None:
    asked = set(re.findall(r"nanopd-lab ([a-z][a-z-]+)", README))
    assert len(asked) >= 15
    for command in asked:
        with pytest.raises(SystemExit) as left:
            build_parser(command).parse_args([command, "--help"])
        assert left.value.code == 0


def test_commands_for_many_machines_are_complete() -> None:
    lines = re.findall(r"^\s*(nanopd-lab .*)$", MANY.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line)[1:]
        assert build_parser(words[0]).parse_args(words).launcher == "ray"


def test_code_is_code() -> None:
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        compile(block, "README.md", "exec")
    (block,) = re.findall(r"```python\n(.*?)```", MANY.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(block), names)
    assert names["config"].ray.placement == "apart"


def test_the_policy_routes_as_it_says() -> None:
    (block,) = (block for block in BLOCKS if "def choose" in block)
    names: dict[str, object] = {}
    exec(block, names)
    policy = names["LongPromptsApart"]()  # type: ignore[operator]
    requests = [SimRequest(f"r{n}", 0.01 * n, prompt, 4) for n, prompt in enumerate((10, 400, 256, 257))]
    config = SimConfig(block_bytes=1, link=LinkModel(bytes_per_s=1e9))
    result = Simulator(policy, [Role.MIXED] * 3, ConstantTime(0.1), requests, config).run()  # type: ignore[arg-type]
    assert result.problems() == []
    sources = [str(record.route).partition("→")[0] for record in result.records]
    assert [sources[n] == "w2" for n in (1, 3)] == [True, True]
    assert sources[0] != "w2" != sources[2]
