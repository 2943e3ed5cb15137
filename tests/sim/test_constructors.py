"""Dataclasses with constructors that are written out are made from the same arguments, and hold the same."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import types
from pathlib import Path

import pytest

from nanopd_lab.sim.compiled import MODULES
from nanopd_lab.sim.constructors import declare_acyclic, write_out_constructors

PACKAGE = Path(__file__).resolve().parents[2] / "nanopd_lab"

SOURCE = """
from dataclasses import dataclass, field

@dataclass
class Bare:
    first: int
    second: list[int] = field(default_factory=list)

@dataclass(
    slots=True
)
class Checked:
    first: int = 3

    def __post_init__(self):
        if self.first < 0:
            raise ValueError(f"{self.first} is negative")

@dataclass(frozen=True)
class Frozen:
    first: int

@dataclass(eq=False, slots=True)
class Late:
    first: list[int]
    second: int = field(init=False)

    def __post_init__(self):
        self.second = len(self.first)

class Plain:
    first: int = 1
"""


def _loaded(source: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look there
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    finally:
        del sys.modules[name]
    return module


def test_constructors_are_written_out() -> None:
    written = write_out_constructors(SOURCE)
    module = _loaded(written, "written")
    assert written.count("def __init__") == 4
    assert dataclasses.asdict(module.Bare(1)) == {"first": 1, "second": []}
    assert module.Bare(1).second is not module.Bare(1).second
    assert module.Bare(1, [2]) == module.Bare(second=[2], first=1)
    assert not hasattr(module.Checked(), "__dict__")
    with pytest.raises(ValueError, match="-1 is negative"):
        module.Checked(-1)
    assert module.Late([5, 6]).second == 2
    assert len({module.Frozen(1), module.Frozen(1), module.Frozen(2)}) == 2


def test_values_are_kept_from_the_garbage_collector() -> None:
    lines = declare_acyclic("from __future__ import annotations\n" + SOURCE).splitlines()
    assert lines[:2] == ["from __future__ import annotations", "from mypy_extensions import mypyc_attr"]
    declared = [number for number, line in enumerate(lines) if line == "@mypyc_attr(acyclic=True)"]
    assert [lines[number + 1] for number in declared] == ["@dataclass(", "@dataclass(eq=False, slots=True)"]
    assert "mypyc_attr" not in declare_acyclic("class Plain:\n    first: int = 1")


@pytest.mark.parametrize("name", MODULES)
def test_every_compiled_module_keeps_its_dataclasses(name: str) -> None:
    plain = importlib.import_module(f"nanopd_lab.{name.replace('/', '.')}")
    written = _loaded(
        write_out_constructors((PACKAGE / f"{name}.py").read_text()), plain.__name__ + "_written"
    )
    for each in vars(plain).values():
        if not (
            dataclasses.is_dataclass(each) and isinstance(each, type) and each.__module__ == plain.__name__
        ):
            continue
        other = getattr(written, each.__name__)
        parameters = inspect.signature(each).parameters
        assert list(parameters) == list(inspect.signature(other).parameters)
        if "__init__" in vars(other) and not hasattr(each, "__post_init__"):
            needed = [number for number, it in enumerate(parameters.values()) if it.default is it.empty]
            one, two = each(*needed), other(*needed)
            for field in dataclasses.fields(each):
                a, b = getattr(one, field.name), getattr(two, field.name)
                assert a == b or type(a).__name__ == type(b).__name__, field.name
