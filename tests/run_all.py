"""Everything that has to hold before a commit is good: `make test` and CI run this, nothing else.

    python tests/run_all.py                 # all stages
    python tests/run_all.py lint types      # some of them

Every stage runs even if one before it failed; the exit status is 1 if any did. Ends with the totals of all
tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Totals:
    """Tests counted over all stages."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add_junit(self, report: Path) -> None:
        """Add what pytest wrote with --junitxml."""
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            total, failures, errors, skipped = (
                int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
            )
            self.failed += failures + errors
            self.skipped += skipped
            self.passed += total - failures - errors - skipped

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


@dataclass
class Run:
    """One call of this script: what the stages share."""

    scratch: Path
    totals: Totals = field(default_factory=Totals)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def command(self, *words: str, log: Path | None = None, **environment: str) -> bool:
        """Run a module of this interpreter in the repository; True if it succeeded.

        With a log what it prints is kept until it has ended, so that it is not mixed with another's.
        """
        line = f"$ {' '.join(f'{name}={value} ' for name, value in environment.items())}python -m {' '.join(words)}"
        command, environ = [sys.executable, "-m", *words], {**os.environ, **environment}
        if log is None:
            print(line, flush=True)
            return subprocess.run(command, cwd=ROOT, env=environ).returncode == 0
        with log.open("w") as out:
            code = subprocess.run(
                command, cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT
            ).returncode
        print(line, log.read_text(errors="replace"), sep="\n", flush=True)
        return code == 0

    def pytest(self, *words: str, aside: bool = False, **environment: str) -> bool:
        """Run pytest and count its tests. No tests at all is a failure: it would hide a broken path.

        Args:
            aside: another one runs at the same time
        """
        report = self.scratch / f"{time.monotonic_ns()}.xml"
        log = report.with_suffix(".log") if aside else None
        # Workers share the cores: one computing thread each, or they wait for one another.
        environment["OMP_NUM_THREADS"] = "1"
        succeeded = self.command("pytest", f"--junitxml={report}", *words, log=log, **environment)
        with self.lock:
            return self._counted(report) and succeeded

    def _counted(self, report: Path) -> bool:
        if not report.is_file():
            self.totals.failed += 1
            return False
        before = self.totals.passed
        self.totals.add_junit(report)
        return self.totals.passed > before


def lint(run: Run) -> bool:
    """ruff: mistakes, and the one format."""
    return all([run.command("ruff", "check", "."), run.command("ruff", "format", "--check", ".")])


def types(run: Run) -> bool:
    """mypy over the package."""
    return run.command("mypy")


def tests(run: Run) -> bool:
    """The test-suite, by two workers; in CI with a browser, which the widgets' test wants."""
    if os.environ.get("CI") == "true" and not shutil.which("chromium") and os.geteuid() == 0:
        for words in (("update", "-qq"), ("install", "-qq", "-y", "chromium", "fonts-dejavu-core")):
            subprocess.run(["apt-get", *words], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    return run.pytest("-q", "-n", "2", "--dist", "loadgroup", "tests")  # see tests/distribution.py


def notebooks(run: Run) -> bool:
    """Every notebook runs from top to bottom: strictly with untouched stubs, and with the package's own code.

    Plain `--nbval` compares all that `--nbval-lax` compares, and without its sanitizing: that run is the
    learner's in both. The two runs share the cores.
    """
    if not any((ROOT / "notebooks").glob("*.ipynb")):
        print("no notebooks yet")
        return True
    # A cell may wait for the other run; the limit is for one that hangs.
    common = ("-q", "--nbval-cell-timeout=300", "notebooks")
    lax = ("--nbval-lax", "--nbval-current-env", "--nbval-sanitize-with", "tests/nbval_sanitize.cfg")
    # A developer's own kept parts and ledger stay out of it.
    folders = {mode: str(run.scratch / f"kept-{mode}") for mode in ("learner", "reference")}
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(
                run.pytest, *common, *words, aside=True, NANOPD_LAB_MODE=mode, NANOPD_LAB_FOLDER=folders[mode]
            )
            for mode, words in (("learner", ("--nbval",)), ("reference", lax))
        ]
        return all(each.result() for each in runs)


def wheel(run: Run) -> bool:
    """sdist and wheel build; the wheel works alone, with only what it declares."""
    out = run.scratch / "dist"
    if not run.command("build", "--no-isolation", "--outdir", str(out), "."):
        return False
    built = sorted(out.glob("*.whl"))
    assert len(built) == 1, built
    return run.command("tests.wheel_check", str(built[0]), str(run.scratch / "empty"))


STAGES: tuple[Callable[[Run], bool], ...] = (lint, types, wheel, notebooks, tests)


def main() -> int:
    """Run the stages named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    names = [stage.__name__ for stage in STAGES]
    parser.add_argument("stage", nargs="*", help=f"any of {', '.join(names)}; default all")
    chosen = parser.parse_args().stage
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"unknown stage {', '.join(unknown)}; choose from {', '.join(names)}")
    outcome: list[tuple[str, bool, float]] = []
    with tempfile.TemporaryDirectory(prefix="nanopd_lab-") as scratch:
        run = Run(Path(scratch))
        for stage in STAGES:
            if chosen and stage.__name__ not in chosen:
                continue
            print(f"\n=== {stage.__name__}: {stage.__doc__}", flush=True)
            began = time.monotonic()
            outcome.append((stage.__name__, stage(run), time.monotonic() - began))
    print("\n=== summary")
    for name, succeeded, seconds in outcome:
        print(f"{'ok    ' if succeeded else 'FAILED'} {name:<10} {seconds:6.1f} s")
    # A stage that is not made of tests, and failed, must show in the last line too.
    others = [name for name, succeeded, _ in outcome if not succeeded and name not in ("tests", "notebooks")]
    run.totals.failed += len(others)
    print(run.totals, flush=True)
    return int(not all(succeeded for _, succeeded, _ in outcome))


if __name__ == "__main__":
    sys.exit(main())
