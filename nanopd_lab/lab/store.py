"""Keeping a learner's parts: each as a Python file that stands alone.

A function's source alone is not enough, because it may use names of its notebook: imported modules and
objects, helper functions, plain constants. These are found and written above it. Files, not pickles: they can
be read, compared and mended, and survive another Python version.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import linecache
import symtable
import textwrap
import types
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

LEDGER = "ledger.json"
HEADER = "# Kept by lab.save(); lab.load() brings it back after checking it again.\n"


@dataclass(frozen=True)
class Row:
    """A row of the ledger."""

    notebook: str
    metric: str
    before: str
    after: str

    @property
    def cells(self) -> tuple[str, ...]:
        return astuple(self)


def save(folder: Path, parts: Mapping[str, Any], ledger: Mapping[str, Row]) -> None:
    """Write each part to `<name>.py` and add the ledger's rows to those kept before.

    Raises:
        ValueError: see `standalone` and `load_ledger`; nothing has been written.
    """
    texts = {name: standalone(impl, name) for name, impl in parts.items()}
    rows = {**load_ledger(folder), **ledger}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    text = json.dumps({key: asdict(row) for key, row in rows.items()}, indent=1, ensure_ascii=False)
    (folder / LEDGER).write_text(text + "\n", encoding="utf-8")


def load_ledger(folder: Path) -> dict[str, Row]:
    """The ledger's rows by notebook; empty if nothing was kept.

    Raises:
        ValueError: the file is broken.
    """
    file = folder / LEDGER
    if not file.is_file():
        return {}
    try:
        return {key: Row(**row) for key, row in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); mend it, or delete it to begin a new ledger"
        ) from None


def kept(folder: Path) -> list[Path]:
    """The files of parts; their stems are the exercises' names."""
    return sorted(folder.glob("*.py"))


def load_part(file: Path) -> Any:
    """What a kept file defines. Runs it: it is the learner's own code.

    Raises:
        ValueError: it cannot be run, or defines no part.
    """
    # Under this name the source can be found again, by tracebacks and by the next save.
    label = f"<kept {file.stem}>"
    namespace: dict[str, Any] = {"__name__": "__lab__"}
    try:
        text = file.read_text(encoding="utf-8")
        linecache.cache[label] = (len(text), None, text.splitlines(keepends=True), label)
        exec(compile(text, label, "exec"), namespace)
        return namespace["PART"]
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{file} cannot be used ({type(error).__name__}: {error}); mend it, or delete it"
        ) from error


def standalone(impl: Any, name: str) -> str:
    """Source text that defines `impl` and everything of its notebook that it uses, and calls it PART.

    Raises:
        ValueError: it uses something that cannot be written down, such as a list or a model of the notebook.
    """
    if isinstance(impl, str):
        lines = "".join(f"    {line!r}\n" for line in str(impl).splitlines(keepends=True))
        return f"{HEADER}PART = (\n{lines})\n"
    if not isinstance(impl, (types.FunctionType, type)) or not impl.__name__.isidentifier():
        raise ValueError(f"{name} is {impl!r}, which cannot be kept in a file; write it as a def")
    imports: set[str] = set()
    definitions: dict[str, str] = {}
    _collect(impl, name, imports, definitions)
    body = "\n\n".join(definitions.values())
    head = "".join(sorted(f"{line}\n" for line in imports if "__future__" not in line))
    return f"{HEADER}from __future__ import annotations\n\n{head}\n{body}\n\nPART = {impl.__name__}\n"


def _collect(thing: Any, exercise: str, imports: set[str], definitions: dict[str, str]) -> None:
    """Write down `thing` after what it uses; each definition once."""
    if thing.__name__ in definitions:
        return
    definitions[thing.__name__] = ""  # a function that calls itself ends here
    text = _definition(thing)
    namespace = _globals(thing)
    for name in sorted(_global_names(text) & set(namespace)):
        value = namespace[name]
        module = getattr(value, "__module__", None)
        if value is thing or name in ("__name__", "__file__"):
            continue
        if isinstance(value, types.ModuleType):
            imports.add(f"import {value.__name__} as {name}")
        elif _importable(value, module):
            imports.add(f"from {module} import {value.__name__} as {name}")
        elif isinstance(value, (types.FunctionType, type)) and value.__name__.isidentifier():
            _collect(value, exercise, imports, definitions)
            if value.__name__ != name:
                definitions.setdefault(name, f"{name} = {value.__name__}")
        elif isinstance(value, (bool, int, float, str, bytes, type(None))):
            definitions.setdefault(name, f"{name} = {value!r}")
        elif hasattr(builtins, name):
            continue
        else:
            raise ValueError(
                f"{exercise} uses `{name}`, a {type(value).__name__} of the notebook that cannot be kept in a file; "
                "give it as an argument, or define it inside"
            )
    del definitions[thing.__name__]  # after what it uses
    definitions[thing.__name__] = text


def _global_names(text: str) -> set[str]:
    """Names that a definition takes from outside, in any scope of it; its own variables are none of them."""
    found: set[str] = set()
    tables = [symtable.symtable(text, "part", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        outer = table.get_type() == "module"  # annotations, defaults, base classes
        found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (outer or s.is_global())}
    return found


def _importable(value: Any, module: str | None) -> bool:
    """True if `from module import name` gives this very object anywhere, not only in this notebook."""
    if not module or module in ("__main__", "__lab__", "builtins") or not hasattr(value, "__name__"):
        return False
    try:
        return getattr(importlib.import_module(module), value.__name__, None) is value
    except ImportError:
        return False


def _code(thing: Any) -> types.CodeType:
    if isinstance(thing, types.FunctionType):
        return thing.__code__
    methods = [member for member in vars(thing).values() if isinstance(member, types.FunctionType)]
    if not methods:
        raise ValueError(f"{thing.__name__} has no method to find its source by")
    return methods[0].__code__


def _globals(thing: Any) -> dict[str, Any]:
    if isinstance(thing, types.FunctionType):
        inner = thing.__closure__ or ()
        cells = dict(zip(thing.__code__.co_freevars, (cell.cell_contents for cell in inner), strict=True))
        return {**thing.__globals__, **cells}
    return next(m.__globals__ for m in vars(thing).values() if isinstance(m, types.FunctionType))


def _definition(thing: Any) -> str:
    """The `def` or `class` of `thing` without decorators.

    `inspect.getsource` cannot find classes of a notebook before Python 3.13.
    """
    code = _code(thing)
    source = "".join(linecache.getlines(code.co_filename))
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in ast.walk(ast.parse(source)) if source else ():
        if isinstance(node, kinds) and node.name == thing.__name__:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first <= code.co_firstlineno <= (node.end_lineno or first):
                lines = source.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
                return textwrap.dedent("".join(lines)).rstrip() + "\n"
    raise ValueError(f"the source of {thing.__name__} cannot be found; define it in a cell or a file")
