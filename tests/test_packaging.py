"""What is declared, pinned and built agrees with what the code uses."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import nanopd_lab

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CORE = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
EXTRAS = {
    canonicalize_name(Requirement(text).name)
    for name, texts in PROJECT["optional-dependencies"].items()
    if name != "dev"
    for text in texts
}
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def imports_of(tree: ast.AST, *, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """(top-level module, whether it is imported only when some function runs or where it may be missing)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], lazy
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0], lazy
        else:
            later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Try))
            later |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            yield from imports_of(node, lazy=lazy or later)


def third_party_imports() -> set[tuple[str, str, bool]]:
    found = set()
    for path in sorted((ROOT / "nanopd_lab").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module, lazy in imports_of(tree):
            if module != "nanopd_lab" and module not in sys.stdlib_module_names:
                found.add((str(path.relative_to(ROOT)), module, lazy))
    return found


def test_every_import_is_declared() -> None:
    """At the top of a module only what is always installed; extras only where they may be missing.

    `viz` is made of matplotlib and ipywidgets, `serve` of FastAPI: nothing else may need them when it is imported.
    """
    homes = metadata.packages_distributions()
    imports = third_party_imports()
    assert {"torch", "transformers", "gguf"} <= {module for _, module, _ in imports}
    wrong = []
    for path, module, lazy in sorted(imports):
        names = {canonicalize_name(name) for name in homes.get(module, [module])}
        optional = lazy or path.startswith(("nanopd_lab/viz/", "nanopd_lab/serve/"))
        if not names & (CORE | EXTRAS if optional else CORE):
            wrong.append(f"{path} imports {module} (from {', '.join(names)})")
    assert wrong == []


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b
from c import d
from . import sibling
if TYPE_CHECKING:
    import e
try:
    import f
except ImportError:
    pass
def g():
    from h.i import j
class K:
    import m
"""
    assert list(imports_of(ast.parse(source))) == [
        ("a", False),
        ("c", False),
        ("e", True),
        ("f", True),
        ("h", True),
        ("m", False),
    ]


def of_cuda(name: str) -> bool:
    """CUDA's own packages, whose exact versions a CUDA build of torch dictates."""
    return name.startswith("nvidia-") or name in ("cuda-bindings", "cuda-toolkit")


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_every_declared_dependency_once(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pinned: dict[str, str] = {}
    for requirement in CONSTRAINTS:
        if requirement.marker and not requirement.marker.evaluate(environment):
            continue
        name = canonicalize_name(requirement.name)
        assert name not in pinned, f"{name} is pinned twice for Python {python}"
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"{requirement} is not exact"
        assert requirement.url is None
        pinned[name] = str(requirement.specifier)[2:]
    declared = [Requirement(text) for text in PROJECT["dependencies"]]
    declared += [Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts]
    for requirement in declared:
        name = canonicalize_name(requirement.name)
        if name in ("nanopd-lab", "pip") or of_cuda(name):
            continue
        assert name in pinned, f"{name} is declared but not in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{requirement} excludes {pinned[name]}"


def test_constraints_hold_what_the_dependencies_need_in_turn() -> None:
    """Transitively, for this interpreter; CUDA's own packages are left to torch."""
    pinned = {canonicalize_name(requirement.name) for requirement in CONSTRAINTS}
    root = [*PROJECT["dependencies"]]
    root += [text for extra in ("lab", "dev") for text in PROJECT["optional-dependencies"][extra]]
    todo, seen = [("nanopd-lab", root)], {"nanopd-lab", "pip", "triton"}
    while todo:
        name, requirements = todo.pop()
        for requirement in map(Requirement, requirements):
            child = canonicalize_name(requirement.name)
            needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if needed and not of_cuda(child) and child not in seen:
                assert child in pinned, f"{child}, needed by {name}, is not in constraints.txt"
                seen.add(child)
                todo.append((child, metadata.requires(child) or []))
    assert len(seen) > 50


def test_conda_installs_what_make_installs() -> None:
    lines = [line.strip(" -") for line in (ROOT / "environment.yml").read_text().splitlines()]
    makefile = (ROOT / "Makefile").read_text()
    assert "constraint constraints.txt" in lines
    assert "--constraint constraints.txt" in makefile
    assert "editable .[dev]" in lines
    assert '--editable ".[dev]"' in makefile
    (python,) = (line for line in lines if line.startswith("python="))
    assert python.removeprefix("python=") in PYTHONS


def test_python_versions_agree() -> None:
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert "version_info < (3, 10)" in (ROOT / "Makefile").read_text()


def test_version_is_said_once_and_alike() -> None:
    assert nanopd_lab.__version__ == PROJECT["version"]


def test_ci_runs_what_a_person_runs() -> None:
    ci = ROOT / ".ci" / "run"
    assert ci.read_text().splitlines()[-1] == "make test"
    assert ci.stat().st_mode & 0o111


@pytest.mark.parametrize("name", ["constraints.txt", "environment.yml", "pyproject.toml", "Makefile"])
def test_no_registry_and_no_machine_is_named(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"index-url|find-links|https?://|file:|/home/|/root/|/opt/", text)
