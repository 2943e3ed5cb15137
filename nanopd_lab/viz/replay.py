"""A finished run, moment by moment. Importing this needs ipywidgets.

replay(json.loads(path.read_text()))     # a result with --save-detailed; or what a simulator or a cockpit has left
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from nanopd_lab.bench.recording import Recording
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.results import SimResult
from nanopd_lab.viz.cockpit_view import cockpit_view
from nanopd_lab.viz.explorer import Explorer

STEPS = 80  # of the slider; drawing one takes a quarter of a second


def replay(
    run: Mapping[str, Any] | RequestTable | SimResult | Recording,
    slo: Slo | None = None,
    window_s: float | None = None,
    title: str | None = None,
) -> Explorer:
    """The dashboard with a slider over the run's time, and buttons that run it.

    Args:
        run, slo, window_s, title: as of `Recording.of`

    Raises:
        ValueError: as `Recording.of`
    """
    recording = Recording.of(run, slo, window_s, title)
    step_s = max(recording.duration_s / STEPS, 1e-6)

    def view(time: float) -> Figure:
        return cockpit_view(recording, time)

    slider = ipywidgets.FloatSlider(
        value=recording.duration_s / 2, min=0.0, max=recording.duration_s, step=step_s, description="time (s)",
        readout_format=".2f", layout=ipywidgets.Layout(width="600px"),
    )  # fmt: skip
    buttons = ipywidgets.Play(value=STEPS // 2, min=0, max=STEPS, interval=400)
    buttons.observe(lambda change: setattr(slider, "value", step_s * change["new"]), "value")
    explorer = Explorer(view, time=slider)
    explorer.children = (buttons, *explorer.children)
    return explorer
