"""A learner's session: what has been written, what has passed, and what goes into the engine.

exercise ──► UNCHECKED ──check──► PASS ──► in parts(), use() and save()
                             └──► TODO or FAIL: the reference stands in
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from nanopd_lab.cluster.config import ClusterParts
from nanopd_lab.cost.calibrate import CostParts
from nanopd_lab.engine.config import EngineParts
from nanopd_lab.lab import store
from nanopd_lab.lab.checking import CannotCheckError, Counterexample, NotWrittenError
from nanopd_lab.lab.registry import Exercise, all_exercises, find
from nanopd_lab.lab.report import CheckFailedError, Report, Status
from nanopd_lab.lab.signature import require_same_signature
from nanopd_lab.lab.text import Note, Source, Table, show
from nanopd_lab.router.pair_rule import RouterParts

T = TypeVar("T")
MODES = ("learner", "reference")
MODE_VARIABLE, FOLDER_VARIABLE = "NANOPD_LAB_MODE", "NANOPD_LAB_FOLDER"


def current_mode() -> str:
    """ "learner" or "reference", from NANOPD_LAB_MODE."""
    mode = os.environ.get(MODE_VARIABLE) or "learner"
    if mode not in MODES:
        raise ValueError(f"{MODE_VARIABLE} is {mode!r}; set it to {' or '.join(MODES)}, or leave it out")
    return mode


@dataclass
class _Attempt:
    """What a learner has written for one exercise."""

    impl: Any
    status: Status = Status.UNCHECKED


class Session:
    """The state behind `lab.exercise`, `lab.check` and the rest.

    Args:
        mode: "learner" or "reference"; None for what NANOPD_LAB_MODE says
        folder: where `save` and `load` keep things; None for what NANOPD_LAB_FOLDER says, else `.lab` in the
            current folder, which for a notebook is the git-ignored notebooks/.lab
    """

    def __init__(self, mode: str | None = None, folder: Path | None = None) -> None:
        self._mode = mode
        self._folder = folder
        self._attempts: dict[str, _Attempt] = {}
        self._ledger: dict[str, store.Row] = {}

    @property
    def mode(self) -> str:
        return self._mode or current_mode()

    @property
    def folder(self) -> Path:
        return self._folder or Path(os.environ.get(FOLDER_VARIABLE) or ".lab")

    # ------------------------------------------------------------------ writing and checking

    @overload
    def exercise(self, name: str) -> Callable[[T], T]: ...

    @overload
    def exercise(self, name: str, impl: T) -> T: ...

    def exercise(self, name: str, impl: Any = None) -> Any:
        """Hand in an implementation: `@lab.exercise(name)` above it, or `lab.exercise(name, source)`.

        In reference mode what is handed in is put aside, and the package's own comes back.

        Raises:
            UnknownExerciseError: no exercise has that name
            SignatureError: it cannot be called like the reference
        """
        entry = find(name)

        def hand_in(impl: Any) -> Any:
            require_same_signature(name, impl, entry.reference)
            if self.mode == "reference":
                return entry.reference
            self._attempts[name] = _Attempt(impl)
            return impl

        return hand_in if impl is None else hand_in(impl)

    def examine(self, name: str, impl: Any) -> Report:
        """Check any implementation without handing it in, and without raising if it is wrong."""
        return _examine(find(name), impl)

    def check(self, name: str) -> Report:
        """Check what was handed in.

        A stub gives TODO, and the package's own stands in. A right one gives PASS, and is used from here on.

        Raises:
            CheckFailedError: it is wrong; the report with the first counterexample has been shown
            ValueError: nothing was handed in
        """
        entry = find(name)
        if self.mode == "reference":
            return _examine(entry, entry.reference)
        if name not in self._attempts:
            raise ValueError(
                f'nothing is handed in for {name}; run the cell with @lab.exercise("{name}") first'
            )
        attempt = self._attempts[name]
        report = _examine(entry, attempt.impl)
        attempt.status = report.status
        if report.status is Status.FAIL:
            _display(report)
            # `from None`: the counterexample is in the report, and twice is once too often.
            raise CheckFailedError(report) from None
        return report

    def hint(self, name: str, level: int = 1) -> Note:
        """Hint 1 is an idea, 2 a way, 3 almost the code."""
        hints = find(name).hints
        if not 1 <= level <= len(hints):
            raise ValueError(
                f'hint level {level}: choose 1 to {len(hints)}; after that there is lab.solution("{name}")'
            )
        return Note(f"{name}, hint {level} of {len(hints)}", hints[level - 1])

    def solution(self, name: str) -> Source:
        """The package's own source."""
        return show(find(name).reference)

    # ------------------------------------------------------------------ using

    def use(self, name: str) -> Any:
        """The learner's implementation if its check passed, else the package's own."""
        attempt = self._attempts.get(name)
        if self.mode == "learner" and attempt and attempt.status is Status.PASS:
            return attempt.impl
        return find(name).reference

    def parts(self) -> EngineParts:
        """`EngineParts` with every part of the learner's that passed its check; the rest is the package's."""
        parts = EngineParts()
        for entry, impl in self._passed(lambda entry: entry.plug is not None):
            assert entry.plug is not None
            parts = entry.plug(parts, impl)
        return parts

    def cluster_parts(self) -> ClusterParts:
        """The same for a cluster's workers; those of their engines are still in `parts`."""
        parts = ClusterParts()
        for entry, impl in self._passed(lambda entry: entry.cluster_plug is not None):
            assert entry.cluster_plug is not None
            parts = entry.cluster_plug(parts, impl)
        return parts

    def cost_parts(self) -> CostParts:
        """The same for what a cost model is made with."""
        parts = CostParts()
        for entry, impl in self._passed(lambda entry: entry.cost_plug is not None):
            assert entry.cost_plug is not None
            parts = entry.cost_plug(parts, impl)
        return parts

    def router_parts(self) -> RouterParts:
        """The same for what a policy is made of."""
        parts = RouterParts()
        for entry, impl in self._passed(lambda entry: entry.router_plug is not None):
            assert entry.router_plug is not None
            parts = entry.router_plug(parts, impl)
        return parts

    def _passed(self, wanted: Callable[[Exercise], bool]) -> Iterator[tuple[Exercise, Any]]:
        """The learner's implementations that passed; warns of those that are not checked yet."""
        for name, attempt in self._attempts.items() if self.mode == "learner" else ():
            entry = find(name)
            if entry.carrier is None or not wanted(entry):
                continue
            if attempt.status is Status.PASS:
                yield entry, attempt.impl
            elif attempt.status is Status.UNCHECKED:
                warnings.warn(
                    f"{name} is not checked yet, so {entry.carrier[1]} gets the package's own; run "
                    f'lab.check("{name}")',
                    stacklevel=3,
                )

    def progress(self) -> Table:
        """Every exercise, how far it is, and whose implementation is in use."""
        rows = []
        for entry in all_exercises():
            attempt = self._attempts.get(entry.name)
            status = attempt.status if attempt else Status.TODO
            owner = "yours" if self.use(entry.name) is not entry.reference else "the package's"
            where = f"{owner}, in {entry.carrier[1]}" if entry.carrier else owner
            rows.append((entry.notebook, entry.name, str(status), where))
        done = sum(row[2] == Status.PASS for row in rows)
        caption = f"{done} of {len(rows)} done"
        if self.mode == "reference":
            caption = "reference mode: everything is the package's own"
        return Table(("notebook", "exercise", "status", "in use"), tuple(rows), caption)

    # ------------------------------------------------------------------ keeping

    def record(self, notebook: str, metric: str, before: str, after: str) -> Table:
        """Write a row into the ledger: what a notebook changed, measured before and after."""
        self._ledger[notebook] = store.Row(notebook, metric, before, after)
        return self.ledger()

    def ledger(self) -> Table:
        """One row a notebook: what was measured before and after."""
        rows = tuple(self._ledger[key].cells for key in sorted(self._ledger))
        return Table(("notebook", "metric", "before", "after"), rows)

    def save(self) -> str:
        """Keep what passed, and the ledger, for the next notebook; says what was kept.

        Each part becomes a Python file that can be read, and run, by itself. Nothing that was kept before is
        thrown away. In reference mode nothing is kept.

        Raises:
            ValueError: a part needs something of the notebook that cannot be written down; it is named
        """
        if self.mode == "reference":
            return "reference mode: nothing to keep"
        passed = {n: a.impl for n, a in self._attempts.items() if a.status is Status.PASS}
        store.save(self.folder, passed, self._ledger)
        return f"kept in {self.folder.name}: {', '.join(sorted(passed)) or 'no exercise yet'}"

    def load(self) -> str:
        """Bring back what `save` kept. Every part is checked again before it is used; says what came back."""
        if self.mode == "reference":
            return "reference mode: nothing to bring back"
        lines = []
        try:
            self._ledger = {**store.load_ledger(self.folder), **self._ledger}
        except ValueError as error:
            lines.append(f"not used: {error}")
        for file in store.kept(self.folder):
            name = file.stem
            try:
                self.exercise(name, store.load_part(file))
                self.check(name)
            except (AssertionError, TypeError, ValueError) as error:
                lines.append(f"not used: {name}: {error}")
            else:
                lines.append(f"{self._attempts[name].status}  {name}")
        return "\n".join(lines) or f"nothing kept in {self.folder.name} yet"


def _examine(entry: Exercise, impl: Any) -> Report:
    require_same_signature(entry.name, impl, entry.reference)
    own = impl is entry.reference
    try:
        cases = entry.check(impl)
    except NotWrittenError:
        message = f'not written yet; the package\'s own stands in. lab.hint("{entry.name}", 1) helps.'
        return Report(entry.name, Status.TODO, message)
    except CannotCheckError as reason:
        return Report(entry.name, Status.UNCHECKED, f"{reason} Until then the package's own stands in.")
    except Counterexample as found:
        return Report(entry.name, Status.FAIL, "wrong", found)
    except Exception as error:  # what came back is of a kind that cannot even be compared
        if own:
            raise
        got = f"something that cannot be compared: {type(error).__name__}: {error}"
        odd = Counterexample(
            entry.name, None, got, "what the package's own returns", "is it of another type or shape?"
        )
        return Report(entry.name, Status.FAIL, "wrong", odd)
    whose = "the package's own" if own else "yours"
    where = ""
    if entry.carrier:
        where = f" {entry.carrier[0]} carries {'it' if own else 'yours'} into {entry.carrier[1]}."
    return Report(entry.name, Status.PASS, f"{whose}: {cases:,} cases right.{where}")


def _display(report: Report) -> None:
    """Show a report now: as HTML in a notebook, as text elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        shell = None
    else:
        shell = get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        display(report)
