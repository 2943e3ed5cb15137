"""The outcome of a check, as text and as HTML."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from html import escape

from nanopd_lab.lab.checking import Counterexample
from nanopd_lab.lab.text import card


class Status(str, enum.Enum):
    """Of an exercise: written and right, not written, wrong, or written and not checked yet."""

    PASS = "PASS"
    TODO = "TODO"
    FAIL = "FAIL"
    UNCHECKED = "unchecked"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Report:
    """What a check found. `counterexample` is set if, and only if, the status is FAIL."""

    exercise: str
    status: Status
    message: str
    counterexample: Counterexample | None = None

    @property
    def line(self) -> str:
        """Everything that matters on one line."""
        found = self.counterexample
        what = self.message
        if found:
            what = "; ".join([*found.before, f"{found.call} gave {found.got}, want {found.want}"])
        return f"{self.status} {self.exercise}: {what}"

    def __str__(self) -> str:
        head = f"{self.status}  {self.exercise}"
        if self.counterexample:
            return f"{head}\n{self.counterexample}"
        return f"{head}  {self.message}"

    def _repr_html_(self) -> str:
        head = f"<b>{escape(self.exercise)}</b>"
        if self.counterexample is None:
            return card(str(self.status), f"{head} &nbsp;{escape(self.message)}")
        rows = "".join(
            f'<tr style="background:none"><td style="text-align:left;opacity:.75;vertical-align:top">{label}</td>'
            f'<td style="text-align:left"><{tag} style="background:none">{escape(text)}</{tag}></td></tr>'
            for label, text in self.counterexample.rows()
            for tag in ("span" if label == "why" else "code",)
        )
        return card(str(self.status), f'{head}<table style="margin:.3em 0 0;border:none">{rows}</table>')

    __repr__ = __str__


class CheckFailedError(AssertionError):
    """A check found a counterexample. In a notebook the report above says it all, so the traceback is short."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback."""
        return [self.report.line]
