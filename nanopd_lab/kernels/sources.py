"""The text of `cuda/`: one definition out of a file, and a kernel with another text in that definition's place.

A learner's function is not called by the kernel from outside: it stands in the header where the package's own
stands, so the compiler builds the very same kernel around it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nanopd_lab.kernels.emulator import includes
from nanopd_lab.resources import cuda_dir

YOURS = "yours.cu"  # what a text put in place is called in findings and compiler messages
_INCLUDE = re.compile(r'\s*#include "([\w./]+)"')


class CudaText(str):
    """A piece of a file in `cuda/` that knows where it stands: `file`, and `line` of its first line."""

    file: str
    line: int

    def __new__(cls, text: str, file: str, line: int) -> CudaText:
        made = super().__new__(cls, text)
        made.file, made.line = file, line
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:  # so that it can be copied
        return str(self), self.file, self.line


def definition(file: str, name: str) -> CudaText:
    """The function or struct `name` of `cuda/<file>`, with the comment above it.

    Raises:
        ValueError: there is none.
    """
    lines = (cuda_dir() / file).read_text(encoding="utf-8").splitlines(keepends=True)
    at_margin = re.compile(rf"(?=[^\s/#}}]).*\b{name}\b")
    for index, line in enumerate(lines):
        if not at_margin.match(line) or re.match(r"(constexpr|static_assert|#)", line):
            continue
        first = index
        while first and re.match(r"//|template|extern|DEVICE\b.*[^;}]$", lines[first - 1]):
            first -= 1
        last = next(
            (
                i
                for i in range(index, len(lines))
                if lines[i].startswith("}") or re.search(r"\{.*\}$", lines[i])
            ),
            None,
        )
        if last is not None:
            return CudaText("".join(lines[first : last + 1]), file, first + 1)
    raise ValueError(f"cuda/{file} defines no {name}")


def replaced(own: CudaText, text: str) -> dict[str, str]:
    """The header that holds `own`, with `text` in its place: what `with_headers` takes."""
    lines = (cuda_dir() / own.file).read_text(encoding="utf-8").splitlines(keepends=True)
    first, after = own.line - 1, own.line - 1 + len(own.splitlines())
    middle = f'#line 1 "{YOURS}"\n{text}\n#line {after + 1} "{own.file}"\n'
    return {own.file: "".join([*lines[:first], middle, *lines[after:]])}


def with_headers(source: str, headers: Mapping[str, str], name: str) -> str:
    """`source`, a file called `name`, with these texts for some of the headers that it includes, directly or not.

    They are written out in place of their #include, and so is every header that includes one of them; #line keeps
    the names and numbers of lines, so that whatever is reported still points to where one would look.
    """
    done: set[str] = set()

    def concerned(header: str) -> bool:
        text = (cuda_dir() / header).read_text(encoding="utf-8") if (cuda_dir() / header).exists() else ""
        inner = _INCLUDE.findall(text) + _INCLUDE.findall(includes(text))
        return header in headers or any(other in headers for other in inner)

    def expand(text: str, label: str) -> str:
        written = []
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            found = _INCLUDE.match(line)
            if found and concerned(header := found.group(1)):
                inner = ""
                if header not in done:
                    done.add(header)
                    own = headers.get(header) or (cuda_dir() / header).read_text(encoding="utf-8")
                    inner = f'#line 1 "{header}"\n{expand(own, header)}'
                written.append(f'{inner}\n#line {number + 1} "{label}"\n')
            elif line.strip() == "#pragma once":
                written.append("\n")
            else:
                written.append(line)
        return "".join(written)

    return expand(source, name) if headers else source
