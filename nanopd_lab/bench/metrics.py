"""The figures of a serving benchmark, with the names and definitions of `vllm bench serve` (its `calculate_metrics`).

    TTFT  from sending to the first token           ITL  every gap between two tokens of a request, pooled
    TPOT  (E2EL - TTFT) / (output tokens - 1)       E2EL from sending to the last token

Requests that failed are counted apart and are in no latency; their tokens don't count. A latency that nobody has is
None, where vLLM writes 0. The simulator does not stamp every token, so of its ITL only the mean is known, which is
exact (all gaps of a request add up to its time from first to last token); the rest is None.

What is not vLLM's is in `bench.disaggregation`: times from the schedule, stages, attainment with drops as misses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.results import RequestRecord

Floats = NDArray[np.float64]
LATENCIES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
PERCENTILES = (50.0, 90.0, 99.0)


@dataclass(slots=True)
class LoadRecord(RequestRecord):
    """One request as the load generator saw it; times in s from the begin of the schedule.

    sent: when it was given to the cluster; None: it was not
    token_times: when each output token came
    text: of the output
    """

    sent: float | None = None
    token_times: Sequence[float] = ()
    text: str = ""


@dataclass(frozen=True)
class Selection:
    """Which latencies a result has, and which percentiles of them, as `--percentile-metrics` and
    `--metric-percentiles`.

    Raises:
        ValueError: an unknown latency, or a percentile outside [0, 100].
    """

    latencies: tuple[str, ...] = tuple(LATENCIES)
    percentiles: tuple[float, ...] = PERCENTILES

    def __post_init__(self) -> None:
        if unknown := set(self.latencies) - set(LATENCIES):
            raise ValueError(f"unknown metric {sorted(unknown)[0]!r}; choose of {', '.join(LATENCIES)}")
        for percent in self.percentiles:
            if not 0 <= percent <= 100:
                raise ValueError(f"percentile {percent}; it must lie in [0, 100]")

    @classmethod
    def parse(cls, latencies: str, percentiles: str) -> Selection:
        """From `ttft,tpot` and `50,99.9`. Raises ValueError."""
        try:
            numbers = tuple(float(each) for each in percentiles.split(","))
        except ValueError:
            raise ValueError(
                f"percentiles {percentiles!r}; write numbers with commas, as 50,90,99.9"
            ) from None
        return cls(tuple(latencies.split(",")), numbers)


class Served:
    """Columns over the completed of `records`: seconds, tokens. `sent` of a simulated request is its arrival.

    total: how many records there are; duration_s: see the function
    """

    def __init__(self, records: Sequence[RequestRecord]) -> None:
        done = [record for record in records if record.ok]
        self.total = len(records)
        self.records = done
        self.duration_s = duration_s(records)
        self.scheduled = column([record.arrival for record in done])
        self.sent = column([sent_of(record) for record in done])
        self.first = column([record.first_token for record in done])
        self.finished = column([record.finished for record in done])
        self.prompt_tokens = column([record.prompt_tokens for record in done])
        self.output_tokens = column([record.output_tokens for record in done])

    @cached_property
    def latencies(self) -> dict[str, Floats]:
        """Seconds by name; `itl` has the gaps that were stamped."""
        return self.since(self.sent) | {"itl": _gaps(self.records)}

    def since(self, start: Floats) -> dict[str, Floats]:
        """`ttft`, `tpot` and `e2el` counted from `start`."""
        several = self.output_tokens > 1
        return {
            "ttft": self.first - start,
            "tpot": ((self.finished - self.first)[several]) / (self.output_tokens[several] - 1),
            "e2el": self.finished - start,
        }

    def good(self, slo: Slo, start: Floats) -> int:
        """How many met all objectives, counted from `start`; TPOT is 0 for one token."""
        tpot = (self.finished - self.first) / np.maximum(self.output_tokens - 1, 1)
        met = self.first - start <= slo.ttft_s
        met &= np.where(self.output_tokens > 1, tpot, 0.0) <= slo.tpot_s
        return int(np.count_nonzero(met & (self.finished - start <= slo.e2e_s)))


def sent_of(record: RequestRecord) -> float | None:
    """When it was sent."""
    return record.sent if isinstance(record, LoadRecord) else record.arrival


def duration_s(records: Iterable[RequestRecord]) -> float:
    """From the first request sent to the last one ended, drain included; 0 if nothing was."""
    spans = [(sent_of(record), record.finished) for record in records]
    begun = min((sent for sent, _ in spans if sent is not None), default=0.0)
    return max((end for _, end in spans if end is not None), default=begun) - begun


def serving_metrics(
    records: Sequence[RequestRecord],
    slo: Slo | None = None,
    selection: Selection | None = None,
    served: Served | None = None,
) -> dict[str, Any]:
    """The keys that `vllm bench serve` writes of what it measured, in its order; times in ms.

    Args:
        slo: for `request_goodput`, which is None without
        served: of the same records, if somebody has it
    """
    served, selection = served or Served(records), selection or Selection()
    duration = served.duration_s
    tokens_in, tokens_out = int(served.prompt_tokens.sum()), int(served.output_tokens.sum())
    completed = len(served.records)

    def per_second(count: float) -> float:
        return count / duration if duration else 0.0

    goodput = per_second(served.good(slo, served.sent)) if slo is not None and slo.given else None
    found: dict[str, Any] = {
        "duration": duration,
        "completed": completed,
        "failed": len(records) - completed,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": per_second(completed),
        "request_goodput": goodput,
        "output_throughput": per_second(tokens_out),
        "total_token_throughput": per_second(tokens_in + tokens_out),
        "max_output_tokens_per_s": _peak_tokens_per_s(served),
        "max_concurrent_requests": int(concurrency(served.sent, served.finished)[1].max(initial=0)),
        "rtfx": 0.0,  # of audio, of which there is none
    }
    for name in selection.latencies:
        found |= spread(name, served.latencies[name], selection.percentiles)
    if "itl" in selection.latencies and not len(served.latencies["itl"]):
        gaps = float(np.maximum(served.output_tokens - 1, 0).sum())
        if gaps:
            found["mean_itl_ms"] = 1e3 * float((served.finished - served.first).sum()) / gaps
    return found


def details(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """What `--save-detailed` adds: lists with an entry a request, in s; None where there is nothing."""
    loaded = [record if isinstance(record, LoadRecord) else None for record in records]
    sent = [sent_of(record) for record in records]
    both = list(zip(records, sent, strict=True))
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens if record.ok else 0 for record in records],
        "ttfts": [_minus(record.first_token, start) for record, start in both],
        "itls": [np.diff(each.token_times).tolist() if each else [] for each in loaded],
        "latencies": [_minus(record.finished, start) if record.ok else None for record, start in both],
        "start_times": sent,
        "queue_times": [_minus(start, record.arrival) for record, start in both],
        "generated_texts": [each.text if each else "" for each in loaded],
        "errors": [record.error or "" for record in records],
    }


def spread(name: str, values_s: Floats, percentiles: Sequence[float]) -> dict[str, float | None]:
    """`mean_`, `median_`, `std_` and percentiles (linear between order statistics) of a latency, in ms."""
    values = 1e3 * values_s
    some = len(values) > 0
    found: dict[str, float | None] = {
        f"mean_{name}_ms": float(values.mean()) if some else None,
        f"median_{name}_ms": float(np.median(values)) if some else None,
        f"std_{name}_ms": float(values.std()) if some else None,
    }
    points = np.percentile(values, percentiles) if some and percentiles else [None] * len(percentiles)
    for percent, point in zip(percentiles, points, strict=True):
        word = str(int(percent)) if int(percent) == percent else str(percent)
        found[f"p{word}_{name}_ms"] = None if point is None else float(point)
    return found


def concurrency(begin: Floats, end: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """(times, how many of the half-open spans hold from each time on); one that ends goes before one that begins."""
    times = np.concatenate([end, begin])
    steps = np.concatenate([np.full(len(end), -1), np.full(len(begin), 1)])
    order = np.lexsort((steps, times))
    return times[order], np.cumsum(steps[order])


def column(values: Sequence[float | None]) -> Floats:
    """Of a list, which numpy takes in much faster than what makes its values one by one; nan for None."""
    return np.array(values, dtype=np.float64)


def _gaps(records: Iterable[RequestRecord]) -> Floats:
    found = [np.diff(r.token_times) for r in records if isinstance(r, LoadRecord) and len(r.token_times) > 1]
    return np.concatenate(found) if found else np.empty(0)


def _peak_tokens_per_s(served: Served) -> float | None:
    """Most tokens in one of the seconds counted from the first request on; None if tokens were not stamped."""
    stamps = [
        np.asarray(r.token_times) for r in served.records if isinstance(r, LoadRecord) and r.token_times
    ]
    if not stamps:
        return None
    seconds = (np.concatenate(stamps) - served.sent.min()).astype(np.int64)
    return float(np.bincount(seconds).max())


def _minus(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier
