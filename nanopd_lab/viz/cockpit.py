"""A run while it goes on. Importing this needs ipywidgets.

cockpit = Cockpit()
display(cockpit)
cluster.bench(workload, report=cockpit.under("collocated"))
"""

from __future__ import annotations

from html import escape

import ipywidgets

from nanopd_lab.bench.load import Progress, Report
from nanopd_lab.viz.style import ALERT, DECODE, PREFILL, WAITING


class Cockpit(ipywidgets.HTML):
    """A bar a run: completed, running, failed, and not sent yet. It only writes text: drawing would take time from what
    is measured."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, Progress] = {}

    def under(self, name: str) -> Report:
        """What a load generator reports to, for a bar of that name."""

        def report(progress: Progress) -> None:
            self.runs[name] = progress
            self.value = "".join(_line(*each) for each in self.runs.items())

        return report


def _line(name: str, seen: Progress) -> str:
    parts = (
        (seen.completed, DECODE),
        (seen.running, PREFILL),
        (seen.failed, ALERT),
        (seen.total - seen.sent, WAITING),
    )
    bar = "".join(
        f'<span style="display:inline-block;height:.8em;width:{360 * count / max(1, seen.total):.0f}px;'
        f'background:{colour}"></span>'
        for count, colour in parts
    )
    return (
        f'<div style="line-height:1.6"><span style="display:inline-block;width:15em">{escape(name)}</span>{bar} '
        f"&nbsp;{seen.elapsed_s:.1f} s: {seen.sent} of {seen.total} sent, {seen.running} running, "
        f"{seen.completed} done, {seen.failed} failed</div>"
    )
