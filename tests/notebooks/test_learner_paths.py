"""A notebook as a learner meets it: wrong code stops at its check, right code runs through it and is kept.

(Untouched stubs are what nbval runs.) Each notebook runs once, in one real kernel: every exercise is answered
wrongly, then rightly, and the right answers stay in use in the cells below.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbclient
import nbformat
import pytest

from nanopd_lab.lab.store import kept, load_part
from tests.lab.wrong_versions import RIGHT, WRONG
from tests.lab.wrong_versions.base import Version
from tests.notebooks.test_hygiene import NOTEBOOKS, read, tags_of, text_of

EXERCISES = [
    (path, match.group(1))
    for path in NOTEBOOKS
    for cell in read(path)["cells"]
    if "exercise" in tags_of(cell) and (match := re.search(r'lab\.exercise\("([\w.]+)"', text_of(cell)))
]


@dataclass(frozen=True)
class Outcome:
    """What became of one exercise."""

    stopped: str  # what its check raised for the wrong version
    saved_wrong: str  # what `lab.save()` printed then
    kept_wrong: dict[str, str]  # name to text of the files in the folder then
    report: str  # the check's result for the right version
    saved: str
    kept: dict[str, str]


class Walk:
    """One notebook, run in a kernel of its own as far as each exercise in turn."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        self.notebook = nbformat.read(path, as_version=4)
        self.client = nbclient.NotebookClient(
            self.notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )

    @property
    def kept(self) -> Path:
        return self.folder / "kept"

    def outcomes(self) -> dict[str, Outcome]:
        environment = {
            **os.environ,
            "NANOPD_LAB_MODE": "learner",
            "NANOPD_LAB_FOLDER": str(self.kept),
            "PYTHONPATH": str(self.path.parents[1]),
        }
        self.client.reset_execution_trackers()
        with self.client.setup_kernel(env=environment):
            return dict(self._exercises())

    def _exercises(self) -> Iterator[tuple[str, Outcome]]:
        cells, done = self.notebook.cells, 0
        for name in (name for path, name in EXERCISES if path == self.path):
            start, end = (
                next(i for i, cell in enumerate(cells) if text in cell.source)
                for text in (f'lab.exercise("{name}"', f'lab.check("{name}")')
            )
            for index in range(done, start):
                self.client.execute_cell(cells[index], index)
            done = end + 1
            with pytest.raises(nbclient.exceptions.CellExecutionError) as stopped:
                self._answer(name, WRONG[name][0][0], start, end)
            saved_wrong, kept_wrong = self._save(), self._kept()
            self._answer(name, RIGHT[name][0], start, end)
            report = cells[end].outputs[0].data["text/plain"]
            yield (
                name,
                Outcome(str(stopped.value), saved_wrong, kept_wrong, report, self._save(), self._kept()),
            )

    def _answer(self, name: str, version: Version, start: int, end: int) -> None:
        """The exercise's cell with `version` in place of the stub, and what follows down to its check."""
        cells = self.notebook.cells
        cells[start].source = source_of(name, version)
        for index in range(start, end + 1):
            self.client.execute_cell(cells[index], index)

    def _save(self) -> str:
        cell = nbformat.v4.new_code_cell("print(lab.save())")
        self.notebook.cells.append(cell)
        return str(self.client.execute_cell(cell, len(self.notebook.cells) - 1).outputs[0].text)

    def _kept(self) -> dict[str, str]:
        return {file.stem: file.read_text() for file in self.kept.glob("*.py")}


def source_of(name: str, version: Version) -> str:
    if isinstance(version, str):
        return f'handed_in = lab.exercise("{name}", r"""{version}""")'
    return f'import math\n\n@lab.exercise("{name}")\n{inspect.getsource(version)}'


@pytest.fixture(scope="module")
def walks() -> dict[Path, dict[str, Outcome]]:
    """By notebook, filled as they are asked for."""
    return {}


@pytest.fixture
def outcome(
    path: Path, name: str, walks: dict[Path, dict[str, Outcome]], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    if path not in walks:
        walks[path] = Walk(path, tmp_path_factory.mktemp(path.stem)).outcomes()
    return walks[path][name]


each_exercise = pytest.mark.parametrize(
    ("path", "name"),
    EXERCISES,
    ids=lambda value: getattr(value, "stem", value),
)


@each_exercise
def test_right_code_passes_and_is_kept(path: Path, name: str, outcome: Outcome, tmp_path: Path) -> None:
    assert outcome.report.startswith(f"PASS  {name}  yours")
    assert name in outcome.saved
    right = RIGHT[name][0]
    if isinstance(right, str):
        (tmp_path / f"{name}.py").write_text(outcome.kept[name])
        assert {file.stem: load_part(file) for file in kept(tmp_path)} == {name: right}
    else:
        assert right.__name__ in outcome.kept[name]


@each_exercise
def test_wrong_code_stops_at_its_check_with_the_counterexample(
    path: Path, name: str, outcome: Outcome
) -> None:
    wrong = WRONG[name][0][0]
    assert f'lab.check("{name}")' in outcome.stopped
    assert f"FAIL {name}: " in outcome.stopped
    assert isinstance(wrong, str) or f"{wrong.__name__}(" in outcome.stopped
    assert "Traceback" not in outcome.stopped
    assert name not in outcome.saved_wrong
    assert name not in outcome.kept_wrong
