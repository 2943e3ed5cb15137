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
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
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

    def command(self, *words: str, **environment: str) -> bool:
        """Run a module of this interpreter in the repository; True if it succeeded."""
        print(f"$ python -m {' '.join(words)}", flush=True)
        environ = {**os.environ, **environment}
        return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environ).returncode == 0

    def pytest(self, *words: str, **environment: str) -> bool:
        """Run pytest and count its tests. No tests at all is a failure: it would hide a broken path."""
        report = self.scratch / f"{time.monotonic_ns()}.xml"
        # Workers share the cores: one computing thread each, or they wait for one another.
        succeeded = self.command("pytest", f"--junitxml={report}", *words, OMP_NUM_THREADS="1", **environment)
        if not report.is_file():
            self.totals.failed += 1
            return False
        before = self.totals.passed
        self.totals.add_junit(report)
        return succeeded and self.totals.passed > before


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
    return run.pytest("-q", "-n", "2", "tests")


def notebooks(run: Run) -> bool:
    """Every notebook runs from top to bottom: with untouched stubs, with the package's own code, and strictly."""
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "notebooks").glob("*.ipynb"))
    if not found:
        print("no notebooks yet")
        return True
    common = ("-q", "-n", "2", "--dist", "loadscope", "--nbval-current-env", "--nbval-cell-timeout=120")
    common += ("--nbval-sanitize-with", "tests/nbval_sanitize.cfg")
    # A developer's own kept parts and ledger stay out of it.
    folder = str(run.scratch / "kept")
    return all(
        [
            run.pytest(*common, "--nbval-lax", *found, NANOPD_LAB_MODE="learner", NANOPD_LAB_FOLDER=folder),
            run.pytest(*common, "--nbval-lax", *found, NANOPD_LAB_MODE="reference", NANOPD_LAB_FOLDER=folder),
            run.pytest("-q", "--nbval", "notebooks", NANOPD_LAB_FOLDER=folder),
        ]
    )


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
