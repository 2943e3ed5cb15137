"""The dashboard of whatever a cluster serves, while it does. Importing this needs ipywidgets.

watch = Watch(cluster, slo)
display(watch)
with watch:
    cluster.bench(workload)
replay(watch.recording())
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import ipywidgets

from nanopd_lab.bench.recorder import INTERVAL_S, Recorder
from nanopd_lab.bench.recording import Recording
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.router.slo import Slo
from nanopd_lab.viz.cockpit_page import page

SHOWN = 240  # newest frames on the lines: a minute


class Watch(ipywidgets.HTML):
    """It only writes text: drawing would take time from what is measured. Every `with` is a recording of its own.

    Args:
        slo, lateness: what requests are judged by, as of `Recorder`
        window_s: that medians and rates look back over
        interval_s: between looks

    Raises:
        ValueError: as `Recorder`.
    """

    def __init__(
        self,
        cluster: Cluster,
        slo: Slo | None = None,
        *,
        window_s: float = 5.0,
        interval_s: float = INTERVAL_S,
        lateness: Mapping[str, float] | None = None,
        title: str | None = None,
    ) -> None:
        super().__init__()
        self.cluster = cluster
        self._options = {
            "slo": slo, "window_s": window_s, "interval_s": interval_s, "lateness": lateness, "title": title,
        }  # fmt: skip
        self.recorder = self._renew()
        self._fresh = True

    def begin(self) -> None:
        """As `with` does. Raises ValueError: it goes on already."""
        if not self._fresh:
            self.recorder.stop()
            self.recorder = self._renew()
        self._fresh = False
        self.recorder.start()

    def end(self) -> None:
        """Take a last look; safe to call twice."""
        self.recorder.stop()

    def __enter__(self) -> Watch:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def recording(self) -> Recording:
        """The last one, so far. Raises ValueError: nothing is recorded."""
        return self.recorder.recording()

    def _renew(self) -> Recorder:
        return Recorder(self.cluster, on_frame=self._show, **self._options)  # type: ignore[arg-type]

    def _show(self, recorder: Recorder) -> None:
        count = len(recorder.frames)
        newest = list(islice(recorder.frames, max(0, count - SHOWN), count))
        now = newest[-1].time_s
        share = 100 * recorder.busy_s / now if now > 0 else 0.0
        note = f"These looks take {share:.1f} % of a processor."
        self.value = page(newest, recorder.slo, recorder.window_s, note)
