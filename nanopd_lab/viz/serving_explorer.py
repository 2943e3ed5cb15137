"""Sliders over the requests of runs: objectives move, goodput follows at once. Importing this needs ipywidgets.

tables = [RequestTable.of(json.loads(path.read_text())) for path in paths]     # of --save-detailed
slo_explorer(tables)
"""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets
import numpy as np
from matplotlib.figure import Figure

from nanopd_lab.router.slo import Slo
from nanopd_lab.viz.explorer import Explorer
from nanopd_lab.viz.serving import Tables, by_policy, goodput_bars
from nanopd_lab.viz.serving_requests import request_timeline, slo_plane, winners

VIEWS: dict[str, Callable[[Tables, Slo], Figure]] = {
    "goodput": goodput_bars,
    "requests in the plane": slo_plane,
    "who has most in time": winners,
    "timeline": request_timeline,
}


def slo_explorer(tables: Tables, slo: Slo | None = None) -> Explorer:
    """Sliders for both objectives over four views of the same requests. No request is served again: the times of each
    are judged anew.

    Args:
        slo: where the sliders stand at first; None: what the first result was run with

    Raises:
        ValueError: no tables, or none with a completed request.
    """
    by_policy(tables)
    ttft = np.concatenate([table.ttft[table.completed] for table in tables])
    tpot = np.concatenate([table.tpot[table.completed] for table in tables])
    if not len(ttft):
        raise ValueError("no request was completed; there is nothing to judge")
    start = slo or tables[0].slo

    def view(ttft_ms: float, tpot_ms: float, shows: str) -> Figure:
        return VIEWS[shows](tables, Slo(ttft_ms / 1e3, tpot_ms / 1e3, start.e2e_s))

    return Explorer(
        view,
        ttft_ms=_slider("TTFT (ms)", 1e3 * ttft, 1e3 * start.ttft_s),
        tpot_ms=_slider("TPOT (ms)", 1e3 * tpot, 1e3 * start.tpot_s),
        shows=ipywidgets.ToggleButtons(options=list(VIEWS), value="goodput"),
    )


def _slider(name: str, values: np.ndarray, start: float) -> ipywidgets.FloatLogSlider:
    """From under the shortest to over the longest time; each step is 2 %."""
    positive = values[values > 0]
    low = np.log10(0.5 * positive.min()) if len(positive) else 0.0
    high = np.log10(2.0 * positive.max()) if len(positive) else 3.0
    middle = start if np.isfinite(start) else float(np.median(positive) if len(positive) else 10**high)
    return ipywidgets.FloatLogSlider(
        value=float(np.clip(middle, 10**low, 10**high)), min=low, max=high, step=float(np.log10(1.02)),
        description=name, readout_format=",.0f", continuous_update=True,
        layout=ipywidgets.Layout(width="520px"),
    )  # fmt: skip
