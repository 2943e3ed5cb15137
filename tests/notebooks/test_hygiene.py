"""What every committed notebook must be, so that running it again is a test at all."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TAGS = {"setup", "exercise", "check", "experiment", "widget", "gpu"}
NBVAL_TAGS = {"nbval-ignore-output", "nbval-check-output"}
EXERCISE_HEADINGS = ["Exercise 1", "Check"]
HEADINGS = ["Goal", "Predict", "Concept", "Code walk", *EXERCISE_HEADINGS, "Experiment"]
HEADINGS += ["What this shows and what it doesn't", "Summary"]
CAPSTONE = "10_capstone"  # has no exercises: it runs what was written in the others
WORDS, MOST_CODE_CELLS, MOST_CODE_LINES, MEDIAN_LINES, MOST_BYTES = (900, 1800), 25, 250, 8, 300_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|tmp|Users|opt|usr|var|mnt)/|[A-Z]:\\\\Users")

Cell = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def text_of(cell: Cell) -> str:
    return "".join(cell["source"])


def tags_of(cell: Cell) -> set[str]:
    return set(cell["metadata"].get("tags", ()))


def problems(notebook: dict[str, Any], size: int = 0) -> list[str]:
    """Everything that is wrong with a notebook, in words."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    markdown = [cell for cell in cells if cell["cell_type"] == "markdown"]
    found = []

    counts = [cell["execution_count"] for cell in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"not executed from top to bottom: {counts}")
    outputs = [output for cell in code for output in cell["outputs"]]
    if any(output["output_type"] == "error" for output in outputs):
        found.append("an output is an error")
    if "widgets" in notebook["metadata"]:
        found.append("widget state is saved")
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")

    ids = [cell.get("id") for cell in cells]
    if None in ids or len(set(ids)) != len(ids):
        found.append("cell ids are missing or not unique")
    if any(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]*)?", str(name)) for name in ids):
        found.append("a cell id is random; name the cell")
    if unknown := {tag for cell in cells for tag in tags_of(cell)} - TAGS - NBVAL_TAGS:
        found.append(f"tags that mean nothing: {unknown}")
    if not any("nbval-check-output" in tags_of(cell) and cell["outputs"] for cell in code):
        found.append("no output is compared (nbval-check-output)")

    for cell, following in zip(code, [*code[1:], None], strict=True):
        tags, source = tags_of(cell), text_of(cell)
        names = re.findall(r"lab\.exercise\(\s*[\"']([\w.]+)[\"']", source)
        if bool(names) != ("exercise" in tags):
            found.append(f"{cell['id']}: lab.exercise and the tag go together")
        for name in names:
            check = text_of(following) if following else ""
            if f'lab.check("{name}")' not in check or "check" not in tags_of(following or cell):
                found.append(f"{cell['id']}: the next code cell does not check {name}")
        if "widget" in tags and "nbval-ignore-output" not in tags:
            found.append(f"{cell['id']}: a widget's output cannot be compared")
        if "gpu" in tags and "nbval-skip" in tags:
            found.append(f"{cell['id']}: a gpu cell branches inside, it is not skipped")

    headings = [
        line[3:].strip() for cell in markdown for line in text_of(cell).splitlines() if line[:3] == "## "
    ]
    exercises = any("exercise" in tags_of(cell) for cell in code)
    wanted = [name for name in HEADINGS if exercises or name not in EXERCISE_HEADINGS]
    positions = [headings.index(name) if name in headings else None for name in wanted]
    if None in positions:
        found.append(
            f"headings are missing: {[n for n, p in zip(wanted, positions, strict=True) if p is None]}"
        )
    elif positions != sorted(positions):  # type: ignore[type-var]
        found.append("headings are out of order")

    links = [m.group(1) for cell in markdown for m in re.finditer(r"\]\(([^)#:]+)", text_of(cell))]
    if dead := [link for link in links if not (FOLDER / link).exists()]:
        found.append(f"links lead nowhere: {dead}")

    words = sum(len(text_of(cell).split()) for cell in markdown)
    lines = [len([line for line in text_of(cell).splitlines() if line.strip()]) for cell in code]
    if not WORDS[0] <= words <= WORDS[1]:
        found.append(f"{words} words, not {WORDS[0]} to {WORDS[1]}")
    if (
        len(code) > MOST_CODE_CELLS
        or sum(lines) > MOST_CODE_LINES
        or statistics.median(lines or [0]) > MEDIAN_LINES
    ):
        found.append(f"{len(code)} code cells of {sum(lines)} lines, median {statistics.median(lines)}")
    if size > MOST_BYTES:
        found.append(f"{size} bytes, over {MOST_BYTES}")
    shown = [json.dumps({k: v for k, v in o.get("data", {}).items() if "image" not in k}) for o in outputs]
    shown += ["".join(output.get("text", "")) for output in outputs]
    if paths := [m.group() for text in [*shown, *map(text_of, cells)] for m in MACHINE_PATH.finditer(text)]:
        found.append(f"absolute paths: {paths}")
    return found


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path: Path) -> None:
    notebook = read(path)
    assert problems(notebook, path.stat().st_size) == []
    assert any("exercise" in tags_of(cell) for cell in notebook["cells"]) != (path.stem == CAPSTONE)


def _cell(notebook: dict[str, Any], tag: str) -> Cell:
    return next(cell for cell in notebook["cells"] if tag in tags_of(cell))


SPOIL = {
    "not executed": lambda n: _cell(n, "check").update(execution_count=None),
    "is an error": lambda n: _cell(n, "check").update(outputs=[{"output_type": "error"}]),
    "widget state": lambda n: n["metadata"].update(widgets={}),
    "not python3": lambda n: n["metadata"]["kernelspec"].update(name="my-kernel"),
    "not unique": lambda n: n["cells"][0].update(id=n["cells"][1]["id"]),
    "is random": lambda n: n["cells"][0].update(id="0f3a9c1e"),
    "mean nothing": lambda n: _cell(n, "check")["metadata"].update(tags=["check", "raises-exception"]),
    "no output is compared": lambda n: [
        cell["metadata"]["tags"].remove("nbval-check-output")
        for cell in n["cells"]
        if "nbval-check-output" in tags_of(cell)
    ],
    "does not check": lambda n: _cell(n, "check").update(source=["lab.progress()"]),
    "go together": lambda n: _cell(n, "exercise")["metadata"].update(tags=[]),
    "cannot be compared": lambda n: _cell(n, "widget")["metadata"].update(tags=["widget"]),
    "headings are missing": lambda n: n["cells"].__setitem__(
        slice(None), [c for c in n["cells"] if not text_of(c).lstrip().startswith("## Predict")]
    ),
    "words, not": lambda n: n["cells"][0].update(source=["many " * 1800]),
    "code cells of": lambda n: _cell(n, "check").update(source=['lab.check("kv.blocks_for")\n'] * 251),
    "lead nowhere": lambda n: n["cells"][0].update(source=["[next](11_nothing.ipynb)"]),
    "absolute paths": lambda n: n["cells"][0].update(source=["see /home/me/x"]),
}


@pytest.mark.parametrize("words", SPOIL)
def test_each_rule_is_enforced(words: str) -> None:
    notebook = read(NOTEBOOKS[0])
    assert problems(notebook) == []
    SPOIL[words](notebook)
    assert words in "\n".join(problems(notebook))


def test_size_is_enforced() -> None:
    assert "bytes, over" in "\n".join(problems(read(NOTEBOOKS[0]), 300_001))


def test_what_a_learner_keeps_is_not_committed() -> None:
    ignored = (FOLDER.parent / ".gitignore").read_text().splitlines()
    assert "/notebooks/.lab/" in ignored
    assert "/.screenshots/" in ignored
