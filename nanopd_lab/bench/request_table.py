"""The requests of a detailed result (`--save-detailed`) as columns, so that other objectives can be judged at once.

table = RequestTable.of(json.loads(path.read_text()))
table.goodput(Slo(ttft_s=0.5, tpot_s=0.05))     # what the run would have said with these objectives
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanopd_lab.bench.disaggregation import STAGES, UNFINISHED, UNSENT
from nanopd_lab.bench.metrics import Floats
from nanopd_lab.bench.report import MODELLED
from nanopd_lab.router.slo import Slo

Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class RequestTable:
    """Columns with a value a request, in order of arrival; seconds, nan where there is none.

    ttft, e2e:      from when it was to be sent; nan: it did not come to its end
    late:           from then until it was sent
    tpot:           0 for an output of one token
    judged:         False for those that an interrupt kept from ending
    stages:         see `bench.disaggregation.STAGES`
    routes:         as "w0->w1"
    gaps:           of all requests, between one token and the next
    """

    policy: str
    modelled: bool
    workers: int
    rate: float
    duration: float
    slo: Slo
    scheduled: Floats
    late: Floats
    ttft: Floats
    tpot: Floats
    e2e: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    judged: Flags
    stages: Mapping[str, Floats]
    routes: Sequence[str]
    gaps: Floats

    def __len__(self) -> int:
        return len(self.scheduled)

    @property
    def completed(self) -> Flags:
        """Which got all of their tokens."""
        return ~np.isnan(self.e2e)

    def met(self, slo: Slo, from_sending: bool = False) -> Flags:
        """Which met all objectives, as `bench.metrics.Served.good` counts them.

        Args:
            from_sending: count from when each was sent, as vLLM does, and not from when it was to be
        """
        late = self.late if from_sending else 0.0
        with np.errstate(invalid="ignore"):  # a comparison with nan is False: a miss
            return (
                (self.ttft - late <= slo.ttft_s)
                & (self.tpot <= slo.tpot_s)
                & (self.e2e - late <= slo.e2e_s)
                & self.completed
            )

    def goodput(self, slo: Slo, from_sending: bool = False) -> float:
        """Requests a second that met all objectives."""
        return float(self.met(slo, from_sending).sum()) / self.duration if self.duration else 0.0

    def attainment(self, slo: Slo) -> float | None:
        """Share of the judged requests that met all objectives; None if there is none."""
        judged = int(self.judged.sum())
        return float(self.met(slo).sum()) / judged if judged else None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> RequestTable:
        """Of a result.

        Raises:
            ValueError: it has no requests in it.
        """
        pd = result["pd"]
        if "per_request" not in pd:
            raise ValueError(
                f"the result of {pd['policy']} has no requests in it; run it again with --save-detailed"
            )
        ttft, e2e, late = (_column(result[name]) for name in ("ttfts", "latencies", "queue_times"))
        outputs = _column(result["output_lens"])
        several = outputs > 1
        each = pd["per_request"]
        promised = pd.get("slo", {})
        return cls(
            pd["policy"],
            result["backend"] == MODELLED,
            pd["workers"],
            float(result["request_rate"]),
            float(result["duration"]),
            Slo(**{
                f: promised[k] / 1e3
                for k, f in (("ttft_ms", "ttft_s"), ("tpot_ms", "tpot_s"), ("e2el_ms", "e2e_s"))
                if k in promised
            }),
            _column(each["scheduled_times"]),
            late,
            np.where(np.isnan(e2e), np.nan, ttft + late),
            np.where(several, (e2e - ttft) / np.where(several, outputs - 1, 1.0), 0.0),
            e2e + late,
            _column(result["input_lens"]),
            outputs,
            np.array([reason not in (UNFINISHED, UNSENT) for reason in each["outcomes"]], dtype=bool),
            {name: _column(each["stages"][name]) for name in STAGES},
            each["routes"],
            np.array([gap for gaps in result["itls"] for gap in gaps], dtype=np.float64),
        )  # fmt: skip


def _column(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
