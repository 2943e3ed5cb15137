"""The simulator runs where torch is not."""

from __future__ import annotations

import subprocess
import sys


def test_simulating_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from nanopd_lab.router import create_policy\n"
        "from nanopd_lab.sim import ConstantTime, SimRequest, Simulator\n"
        "policy, roles = create_policy('1p1d', 2)\n"
        "print(Simulator(policy, roles, ConstantTime(0.1), [SimRequest('r', 0.0, 9, 3)]).run().records[0].ok)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "True", result.stderr


def test_the_command_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from nanopd_lab.cli import main\n"
        "sys.exit(main(['simulate', '--num-prompts', '5', '--policy', '4p4d']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "5 of 5 completed" in result.stdout
