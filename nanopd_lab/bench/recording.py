"""A run as a row of moments: what every worker had at each, and what the requests that had just ended got.

    recording = Recording.of(json.loads(path.read_text()))    # of a result with --save-detailed, or of a simulation
    recording.at(3.5).workers[0].decoding

`bench.recorder` takes frames of a cluster while it serves; those of a finished run are reckoned from the times of its
requests (`bench.lives`). `viz.cockpit_view` draws either.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanopd_lab.bench.disaggregation import per_request
from nanopd_lab.bench.frames import End, Frame, rolled
from nanopd_lab.bench.lives import frames_of
from nanopd_lab.bench.metrics import details
from nanopd_lab.bench.report import MODELLED
from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.results import SimResult

FRAMES = 240  # of a finished run


@dataclass(frozen=True, eq=False)
class Recording:
    """See the module.

    title: what it is, with "measured", "recorded" or "modelled"
    frames, ends: in order of time; the oldest may be missing
    window_s: that `Frame.rolling` looks back over
    kv_unit: what the workers' KV is counted in

    Raises:
        ValueError: no frames.
    """

    title: str
    slo: Slo
    window_s: float
    frames: Sequence[Frame]
    ends: Sequence[End]
    kv_unit: str = "blocks"

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError(
                "nothing is recorded yet; start the cockpit, or give a result with requests in it"
            )

    @property
    def duration_s(self) -> float:
        """To the last frame."""
        return self.frames[-1].time_s

    def index(self, time_s: float) -> int:
        """Of the last frame that is not later; the first if all are."""
        return max(0, bisect_right(self.frames, time_s, key=lambda frame: frame.time_s) - 1)

    def at(self, time_s: float) -> Frame:
        """See `index`."""
        return self.frames[self.index(time_s)]

    @classmethod
    def of(
        cls,
        run: Mapping[str, Any] | RequestTable | SimResult | Recording,
        slo: Slo | None = None,
        window_s: float | None = None,
        title: str | None = None,
    ) -> Recording:
        """Of a finished run: a detailed result, its table, or what a simulator has returned.

        Args:
            slo: other objectives than the run's own
            title: None: the policy, workers and rate
            window_s: to look back over; None: an eighth of the run

        Raises:
            ValueError: there are no requests in it, or a window that is not positive.
        """
        if window_s is not None and not window_s > 0:
            raise ValueError(f"window_s is {window_s}; it must be positive")
        if isinstance(run, Recording):
            return run._again(slo or run.slo, window_s or run.window_s, title or run.title)
        table = run if isinstance(run, RequestTable) else _table(run)
        slo = table.slo if slo is None else slo
        frames, ends, window_s = frames_of(table, slo, window_s, FRAMES)
        kind = "modelled" if table.modelled else "measured"
        words = f"{table.policy}, {table.workers} workers, {table.rate:g} requests/s ({kind})"
        return cls(title or words, slo, window_s, frames, ends, "tokens, by the requests' lengths")

    def _again(self, slo: Slo, window_s: float, title: str) -> Recording:
        if (slo, window_s, title) == (self.slo, self.window_s, self.title):
            return self
        rolling = rolled([frame.time_s for frame in self.frames], self.ends, slo, window_s)
        frames = [frame._replace(rolling=each) for frame, each in zip(self.frames, rolling, strict=True)]
        return replace(self, title=title, slo=slo, window_s=window_s, frames=frames)


def _table(run: Mapping[str, Any] | SimResult) -> RequestTable:
    if not isinstance(run, SimResult):
        return RequestTable.of(run)
    seconds = max((record.arrival for record in run.records), default=0.0)
    return RequestTable.of(
        {
            **details(run.records),
            "backend": MODELLED,
            "request_rate": len(run.records) / seconds if seconds else float("inf"),
            "duration": run.duration_s,
            "pd": {
                "policy": "simulated",
                "workers": len({worker.worker for worker in run.workers}),
                "per_request": per_request(run.records),
            },
        }
    )
