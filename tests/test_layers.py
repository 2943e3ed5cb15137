"""Folders know those below them and none above; the import graph is read from the source, so nothing can hide in a
function. Command lines (`cli.py`, `*_cli.py`) stand above all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "nanopd_lab"
# Attention is computed by kernels, and a cluster asks a policy: these two stand above what they use.
LAYERS = (
    "errors", "settings", "resources", "cache", "hostcc", "provenance", "starting", "core", "kv", "cpu", "kernels",
    "attention", "model", "engine", "transfer", "cost", "router", "cluster", "sim", "bench", "viz", "lab", "serve",
    "demo", "machine", "cli", "__init__", "__main__",
)  # fmt: skip
EXCEPTIONS = {
    (
        "cluster.cluster",
        "bench",
    ): "Cluster.bench(workload) is documented; what drives clusters is imported when called",
    ("model.startup", "engine"): "names the type of the settings that it is told",
    ("viz.report_card", "lab"): "draws a value of the lab, as other figures draw those of their own layers",
}


def imports_of(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}, line {node.lineno}: a relative import"
            assert node.module
            yield node.module
            if node.module == "nanopd_lab":
                yield from (f"nanopd_lab.{alias.name}" for alias in node.names)


def layer_of(parts: tuple[str, ...]) -> str:
    """Of a module, by its path below the package."""
    name = parts[-1]
    return "cli" if name == "cli" or name.endswith("_cli") else parts[0]


def upward() -> dict[tuple[str, str], set[str]]:
    """(module, higher layer) and what it takes from there."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = LAYERS.index(layer_of(parts))
        for module in imports_of(path):
            package, _, below = module.partition(".")
            if package != "nanopd_lab" or not below:
                continue
            theirs = tuple(below.split("."))
            if not (ROOT / theirs[0]).is_dir() and not (ROOT / f"{theirs[0]}.py").is_file():
                continue  # a name that the package itself gives out
            layer = layer_of(theirs)
            if LAYERS.index(layer) > own:
                found.setdefault((".".join(parts), layer), set()).add(module)
    return found


def test_every_folder_has_a_place() -> None:
    there = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert there <= set(LAYERS), f"place {sorted(there - set(LAYERS))} in LAYERS"


def test_nothing_is_imported_from_above() -> None:
    found = upward()
    assert {key: names for key, names in found.items() if key not in EXCEPTIONS} == {}
    assert set(EXCEPTIONS) <= set(found), "an exception that nobody needs any more"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from nanopd_lab.bench import load", ["nanopd_lab.bench"]),
        ("import nanopd_lab.bench.load as load", ["nanopd_lab.bench.load"]),
        ("def f():\n    from nanopd_lab import bench", ["nanopd_lab", "nanopd_lab.bench"]),
        ("if TYPE_CHECKING:\n    from nanopd_lab.sim.clock import Kind", ["nanopd_lab.sim.clock"]),
    ],
)
def test_imports_are_found_wherever_they_are(text: str, wanted: list[str], tmp_path: Path) -> None:
    path = tmp_path / "it.py"
    path.write_text(text)
    assert list(imports_of(path)) == wanted
