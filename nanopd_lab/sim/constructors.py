"""What mypyc cannot know of dataclasses, written into their source: constructors, and that there are no cycles.

Python makes the `__init__` of a dataclass as the class is made, so that a compiler never sees it, and a compiled class
is filled field by field by the interpreter: dearer than in plain Python. Written out, it is compiled like all else.

    @dataclass(slots=True)              @dataclass(init=False, slots=True)
    class Release:                      class Release:
        key: str                            key: str

                                            def __init__(self, key: str) -> None:
                                                self.key = key

Those with slots are values: what they hold does not hold them. Python's garbage collector need not know of them, which
saves them a place each in its list. Taking one out of that list touches its neighbours, far away in memory.
"""

from __future__ import annotations

import ast


def write_out_constructors(source: str) -> str:
    """A module's source with them; other lines stay as they are.

    Frozen dataclasses are thawed, as Python fills them through `object.__setattr__`: the compiled copy is not where
    somebody finds out that he sets a field. Left alone are derived ones, and those that are not simply made of all of
    their fields in order.
    """
    lines = source.splitlines()
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    for node in sorted(classes, key=lambda node: -node.lineno):  # so that lines in front keep their numbers
        decorator = next(filter(_is_dataclass, node.decorator_list), None)
        if decorator is None or node.bases or (made := _constructor(node, decorator)) is None:
            continue
        assert node.end_lineno is not None
        lines[node.end_lineno : node.end_lineno] = ["", *(f"    {line}" for line in made)]
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        assert name.end_lineno is not None
        before, behind = lines[name.end_lineno - 1][: name.end_col_offset], name.end_col_offset
        rest = lines[name.end_lineno - 1][behind:]
        called = isinstance(decorator, ast.Call)
        rest = rest.replace("frozen=True", "unsafe_hash=True")
        lines[name.end_lineno - 1] = (
            f"{before}(init=False, {rest[1:]}" if called else f"{before}(init=False){rest}"
        )
    return "\n".join(lines) + "\n"


def declare_acyclic(source: str) -> str:
    """A module's source in which dataclasses with slots are kept from the garbage collector; not derived ones."""
    lines = source.splitlines()
    tree = ast.parse(source)
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and not node.bases
        and any(_is_dataclass(each) and "slots=True" in ast.unparse(each) for each in node.decorator_list)
    ]
    for node in sorted(found, key=lambda node: -node.lineno):
        lines.insert(node.decorator_list[0].lineno - 1, "@mypyc_attr(acyclic=True)")
    future = [
        each.lineno for each in tree.body if isinstance(each, ast.ImportFrom) and each.module == "__future__"
    ]
    if found:
        lines.insert(max(future, default=0), "from mypy_extensions import mypyc_attr")
    return "\n".join(lines) + "\n"


def _is_dataclass(decorator: ast.expr) -> bool:
    name = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(name, ast.Name) and name.id == "dataclass"


def _constructor(node: ast.ClassDef, decorator: ast.expr) -> list[str] | None:
    """Its lines, or None if it is to be left to Python."""
    options = {each.arg for each in decorator.keywords} if isinstance(decorator, ast.Call) else set()
    methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    if options & {"init", "kw_only"} or "__init__" in methods:
        return None
    parameters, body = [], []
    for each in node.body:
        if not isinstance(each, ast.AnnAssign):
            continue
        assert isinstance(each.target, ast.Name)
        name, kind, value = each.target.id, ast.unparse(each.annotation), each.value
        given = name
        if value is None:
            parameters.append(f"{name}: {kind}")
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
            options_of = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
            if options_of == {"init": "False"}:
                continue  # `__post_init__` sets it
            if "default_factory" in options_of:
                parameters.append(f"{name}: {kind} | None = None")
                given = f"({options_of['default_factory']})() if {name} is None else {name}"
            elif "default" in options_of:
                parameters.append(f"{name}: {kind} = {options_of['default']}")
            if options_of.keys() & {"init", "kw_only"}:
                return None
        else:
            parameters.append(f"{name}: {kind} = {ast.unparse(value)}")
        body.append(f"    self.{name} = {given}")
    if "__post_init__" in methods:
        body.append("    self.__post_init__()")
    return [f"def __init__(self, {', '.join(parameters)}) -> None:", *body]
