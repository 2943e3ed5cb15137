"""A notebook as three learners meet it: right code runs through its check, wrong code stops there.

(Untouched stubs are what nbval runs.) Each exercise cell is replaced in turn, and the notebook runs in a real
kernel up to that exercise's check.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

from nanopd_lab.lab.store import load_parts
from tests.lab.wrong_versions import RIGHT, WRONG
from tests.lab.wrong_versions.base import Version
from tests.notebooks.test_hygiene import NOTEBOOKS, read, tags_of, text_of

EXERCISES = [
    (path, match.group(1))
    for path in NOTEBOOKS
    for cell in read(path)["cells"]
    if "exercise" in tags_of(cell) and (match := re.search(r'lab\.exercise\("([\w.]+)"', text_of(cell)))
]


def run(path: Path, name: str, version: Version, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook's cells up to the check of `name`, with `version` in place of the stub, and one that saves."""
    monkeypatch.setenv("NANOPD_LAB_MODE", "learner")
    monkeypatch.setenv("NANOPD_LAB_FOLDER", str(folder / "kept"))
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    notebook = nbformat.read(path, as_version=4)
    end = next(i for i, cell in enumerate(notebook.cells) if f'lab.check("{name}")' in cell.source)
    notebook.cells = notebook.cells[: end + 1]
    for cell in notebook.cells:
        if f'lab.exercise("{name}"' in cell.source:
            cell.source = source_of(name, version)
    notebook.cells.append(nbformat.v4.new_code_cell("print(lab.save())"))
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook


def source_of(name: str, version: Version) -> str:
    import inspect

    if isinstance(version, str):
        return f'handed_in = lab.exercise("{name}", r"""{version}""")'
    return f'import math\n\n@lab.exercise("{name}")\n{inspect.getsource(version)}'


@pytest.mark.parametrize(("path", "name"), EXERCISES, ids=lambda value: getattr(value, "stem", value))
def test_right_code_passes_and_is_kept(
    path: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = run(path, name, RIGHT[name][0], tmp_path, monkeypatch)
    assert notebook.cells[-2].outputs[0].data["text/plain"].startswith(f"PASS  {name}  yours")
    assert name in notebook.cells[-1].outputs[0].text
    right = RIGHT[name][0]
    if isinstance(right, str):
        assert load_parts(tmp_path / "kept")[name] == right
    else:
        assert right.__name__ in (tmp_path / "kept" / f"{name}.py").read_text()


@pytest.mark.parametrize(("path", "name"), EXERCISES, ids=lambda value: getattr(value, "stem", value))
def test_wrong_code_stops_at_its_check_with_the_counterexample(
    path: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = WRONG[name][0][0]
    with pytest.raises(nbclient.exceptions.CellExecutionError) as stopped:
        run(path, name, wrong, tmp_path, monkeypatch)
    message = str(stopped.value)
    assert f'lab.check("{name}")' in message
    assert f"FAIL {name}: " in message
    assert isinstance(wrong, str) or f"{wrong.__name__}(" in message
    assert "Traceback" not in message
    assert not (tmp_path / "kept").exists()
