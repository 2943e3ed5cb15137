"""The simulator compiled to C by mypyc: the same source files, without the interpreter between their lines.

A simulation is a great many short steps through scheduler, controller and clock, and half of its time is Python's own
bookkeeping. mypyc, which comes with mypy, translates typed modules as they are, so nothing is written twice; only the
constructors that Python makes as a program starts are written out for it first (`sim.constructors`). The package is
copied to the user's cache and compiled there, once for each state of the source: a checkout stays plain Python, which
notebooks change and debuggers step through. Whoever wants the compiled one puts the folder in front:

    PYTHONPATH=$(nanopd-lab compile-simulator) nanopd-lab simulate ...
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from nanopd_lab.cache import cache_dir
from nanopd_lab.resources import cuda_dir, data_dir
from nanopd_lab.sim.constructors import declare_acyclic, write_out_constructors

MODULES = (
    "core",
    "kv/blocks",
    "kv/counted",
    "kv/tables",
    "engine/block_manager",
    "engine/counted_tables",
    "engine/decode_run",
    "engine/handover",
    "engine/lockstep",
    "engine/policies",
    "engine/queues",
    "engine/scheduler",
    "cluster/accounts",
    "cluster/actions",
    "cluster/asking",
    "cluster/controller",
    "cluster/dispatch",
    "cluster/exchange",
    "cluster/lease",
    "cluster/ledger",
    "cluster/messages",
    "cluster/positions",
    "cluster/records",
    "cluster/tries",
    "cluster/worker",
    "cost/iteration",
    "router/fleet",
    "router/policy",
    "router/static",
    "router/veil",
    "sim/clock",
    "sim/config",
    "sim/core",
    "sim/host",
    "sim/links",
    "sim/network",
    "sim/shard",
    "sim/simulator",
    "sim/timing",
    "sim/worker",
    "sim/workload",
)
"""What every event of a simulation passes through, up to the simplest policies. Those that estimate stay as they are:
they are what people replace."""

# What these modules name in annotations only need not be looked through.
_MYPY = """[mypy]
[mypy-torch.*,numpy.*,nanopd_lab.model.*,nanopd_lab.attention.*,nanopd_lab.kernels.*]
follow_imports = skip
ignore_missing_imports = True
"""


class SimulatorCompileError(ValueError):
    """mypyc or the C compiler refused the source; the message holds the end of its log."""


def compiled_root() -> Path:
    """The folder with the compiled package, for `PYTHONPATH`; made if it is not there, in about a minute of CPU time.

    Raises:
        FileNotFoundError: no mypyc, or nothing that it needs; the message says what to install.
        SimulatorCompileError: the source does not compile.
    """
    package = Path(__file__).resolve().parents[1]
    target = cache_dir("simulator") / _key(package)
    if target.exists():
        return target
    if find_spec("mypyc") is None or find_spec("setuptools") is None:
        raise FileNotFoundError(
            f"compiling the simulator needs mypy and setuptools; {sys.executable} -m pip install mypy setuptools"
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        root = Path(folder, "built")
        shutil.copytree(
            package, root / package.name, ignore=shutil.ignore_patterns("__pycache__", "_data", "_cuda")
        )
        for name in MODULES:
            module = root / package.name / f"{name}.py"
            module.write_text(declare_acyclic(write_out_constructors(module.read_text())))
        (root / "mypy.ini").write_text(_MYPY)
        command = [sys.executable, "-m", "mypyc", *(f"{package.name}/{name}.py" for name in MODULES)]
        environment = {**os.environ, "PYTHONPATH": "", "MYPYC_OPT_LEVEL": "2", "MYPYC_DEBUG_LEVEL": "0"}
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise SimulatorCompileError(
                f"mypyc {' '.join(MODULES)} failed; is a C compiler there?\n"
                f"{(result.stdout + result.stderr)[-3000:]}"
            )
        shutil.rmtree(root / "build")
        (root / "data").symlink_to(data_dir())
        (root / "cuda").symlink_to(cuda_dir())
        try:
            root.rename(target)  # atomic: another process sees all of it or nothing
        except OSError:
            if not target.exists():  # else another process has compiled the same meanwhile
                raise
    return target


def _key(package: Path) -> str:
    """Of the source and of the interpreter that it is compiled for."""
    found = hashlib.sha256(f"{sys.version}\0{sys.prefix}\0{package}\0{_MYPY}\0{MODULES}".encode())
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:24]
