"""What can go wrong with a kernel, by name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanopd_lab.kernels.report import Finding


class KernelArgumentError(ValueError):
    """An argument has a shape, type, stride or value that the kernel can't take. Raised before any launch."""


class CompilerMissingError(ValueError):
    """Neither a host C++ compiler (emulator) nor NVRTC (GPU) could be found where one is needed."""


class KernelCompileError(ValueError):
    """A kernel's source doesn't compile.

    `log` is the compiler's whole log, `line` the first source line it complains about (None if it names
    none).
    """

    def __init__(self, name: str, source: str, log: str) -> None:
        found = re.search(rf"{re.escape(name)}[:(](\d+)\)?:?.*?error", log)
        self.name = name
        self.log = log
        self.line = int(found.group(1)) if found else None
        shown = ""
        lines = source.splitlines()
        if self.line and self.line <= len(lines):
            shown = f" at line {self.line}: `{lines[self.line - 1].strip()}`"
        super().__init__(f"{name} does not compile{shown}\n{log.strip()}")


class KernelFaultError(ValueError):
    """The emulator found a fault in a kernel: out of bounds, race, uninitialised read, deadlock.

    `findings` lists them (see `nanopd_lab.kernels.report.Finding`).
    """

    def __init__(self, name: str, findings: tuple[Finding, ...]) -> None:
        self.findings = findings
        super().__init__(f"{name}: " + "\n".join(str(finding) for finding in findings))
