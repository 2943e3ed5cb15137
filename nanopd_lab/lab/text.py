"""Small things to show in a notebook: text with an HTML form that reads in light and dark."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import nanopd_lab
from nanopd_lab.kernels.sources import CudaText

# (colour of the edge, sign): never told apart by colour alone.
LOOKS = {
    "PASS": ("#009E73", "✔"),
    "TODO": ("#E69F00", "○"),
    "FAIL": ("#D55E00", "✘"),
    "unchecked": ("#E69F00", "○"),
    "HINT": ("#0072B2", "?"),
}


def card(kind: str, body: str) -> str:
    """A box with a coloured edge; text keeps the theme's own colour."""
    colour, sign = LOOKS[kind]
    return (
        f'<div style="border-left:5px solid {colour};background:{colour}1f;padding:.45em .8em;max-width:60em">'
        f"<b>{sign} {kind}</b> &nbsp;{body}</div>"
    )


@dataclass(frozen=True)
class Note:
    """A hint."""

    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.title}: {self.text}"

    def _repr_html_(self) -> str:
        return card("HINT", f"<b>{escape(self.title)}</b><br>{_code_marks(self.text)}")

    __repr__ = __str__


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        ]
        return "\n".join(line.rstrip() for line in [*text, self.caption]).rstrip()

    def _repr_html_(self) -> str:
        def line(tag: str, cells: tuple[str, ...]) -> str:
            inner = "".join(f'<{tag} style="text-align:left">{escape(cell)}</{tag}>' for cell in cells)
            return f"<tr>{inner}</tr>"

        caption = f"<p>{escape(self.caption)}</p>" if self.caption else ""
        body = "".join(line("td", row) for row in self.rows)
        return f"<table><thead>{line('th', self.header)}</thead><tbody>{body}</tbody></table>{caption}"

    __repr__ = __str__


@dataclass(frozen=True)
class Source:
    """The source of something in the package, and where it stands."""

    where: str
    text: str
    language: str = "python"  # a name that pygments knows

    def __str__(self) -> str:
        return f"# {self.where}\n{self.text}"

    def _repr_html_(self) -> str:
        try:
            from pygments import highlight
            from pygments.formatters import HtmlFormatter
            from pygments.lexers import get_lexer_by_name
        except ImportError:  # plain text will do
            code = f"<pre>{escape(self.text)}</pre>"
        else:
            # JupyterLab has colours for the class "highlight" in both themes; its boxes in boxes are undone.
            box = "padding:.4em .8em"
            flat = "background:none;padding:0;margin:0"
            look = HtmlFormatter(cssclass="highlight", cssstyles=box, prestyles=flat)
            code = highlight(self.text, get_lexer_by_name(self.language), look)
        return f'<div style="opacity:.75"><code>{escape(self.where)}</code></div>{code}'

    __repr__ = __str__


def show(thing: Any) -> Source:
    """The package's own source of a function, class or method, or a piece of `cuda/`, as it stands in the file."""
    if isinstance(thing, CudaText):
        return Source(f"cuda/{thing.file}, line {thing.line}", thing, "cuda")
    lines, first = inspect.getsourcelines(thing)
    file = Path(inspect.getsourcefile(thing) or "")
    root = Path(nanopd_lab.__file__).resolve().parent.parent
    path = file.resolve()
    shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    return Source(f"{shown}, line {first}", textwrap.dedent("".join(lines)))


def _code_marks(text: str) -> str:
    """`code` between backticks becomes <code>."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if odd % 2 else part for odd, part in enumerate(parts))
