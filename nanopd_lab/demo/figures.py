"""The figure set of the demo, each with what to see in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nanopd_lab.bench.request_table import RequestTable
from nanopd_lab.demo.outcome import Outcome
from nanopd_lab.demo.page import Shown
from nanopd_lab.viz.race import recorded_regret, regret_view
from nanopd_lab.viz.serving import (
    attainment_by_scale,
    goodput_bars,
    itl_distribution,
    latency_breakdown,
    words,
)
from nanopd_lab.viz.serving_model import pays_map, simulated_vs_measured
from nanopd_lab.viz.serving_rates import attainment_by_rate, pareto, percentile_by_rate
from nanopd_lab.viz.serving_requests import request_timeline, slo_plane, winners
from nanopd_lab.viz.style import LabFigure, png

MEASURED, MODELLED, BOTH = "measured here", "modelled", "measured here and modelled"


def measured_figures(outcome: Outcome) -> Iterator[Shown]:
    """Of the requests that were served; nothing if none were."""
    tables, slo = list(outcome.tables().values()), outcome.slo
    if not any(table.completed.any() for table in tables):
        return
    yield Shown(
        "goodput", "Requests served in time", MEASURED,
        "Bars: requests a second and worker that met every objective, and the share of requests that did. Whiskers: "
        "95 % intervals from blocks of requests drawn again. Failed requests are misses.",
        goodput_bars(tables, slo),
    )  # fmt: skip
    yield Shown(
        "scale", "If promises were tighter or looser", MEASURED,
        "The same requests judged by other promises: both objectives times the factor below. Where lines cross, the "
        "better strategy changes; bands are 95 % intervals.",
        attainment_by_scale(tables, slo),
    )  # fmt: skip
    if any(len(table.gaps) for table in tables):
        yield Shown(
            "gaps", "Gaps between tokens", MEASURED,
            "How many of the gaps between two tokens are longer than the axis says. A tail that reaches far to the "
            "right is text that stops while somebody else's prompt is read.",
            itl_distribution(tables, slo.tpot_s),
        )  # fmt: skip
    yield Shown(
        "breakdown", "Where the time goes", MEASURED,
        "The mean completed request. Disaggregation shortens decode (nothing gets in between) and pays for it in "
        "waiting for prefill and for the KV cache to arrive.",
        latency_breakdown(tables),
    )  # fmt: skip
    yield Shown(
        "plane", "Every request by its two latencies", MEASURED,
        "A mark a request. In the shaded corner both objectives are met; hollow marks missed one or both.",
        slo_plane(tables, slo),
    )  # fmt: skip
    yield Shown(
        "winners", "Which strategy for which promise", MEASURED,
        "For every pair of promises, the strategy that has most of these requests in time; the paler, the smaller its "
        "lead. Small leads can be chance: the intervals are in the figures above.",
        winners(tables, slo),
    )  # fmt: skip
    yield Shown(
        "timeline", "The first requests one by one", MEASURED,
        "A line a request, from when it was to be sent. All strategies got the same requests at the same times.",
        request_timeline(tables, slo),
    )  # fmt: skip


def model_figures(outcome: Outcome) -> Iterator[Shown]:
    """Of what the simulator says, beside what was measured."""
    slo = outcome.slo
    if pairs := outcome.pairs():
        yield Shown(
            "parity", "How far to trust the model", BOTH,
            "The same requests, simulated with the cost model, which has seen neither these requests nor their rate. "
            "Each mark is a figure of one strategy; the band is ±10 %.",
            simulated_vs_measured(pairs),
        )  # fmt: skip
    tables = [RequestTable.of(result) for result in outcome.curve]
    tables += [table for table in outcome.tables().values() if table.completed.any()]
    if outcome.curve:
        yield Shown(
            "attainment", "At other request rates", BOTH,
            f"Lines: simulated, the same kind of requests at other rates, within {words(slo)}. Marks: measured here.",
            attainment_by_rate(tables, slo),
        )  # fmt: skip
        for metric, name in (("ttft", "Time to first token"), ("tpot", "Time per output token")):
            yield Shown(
                f"{metric}-rate", f"{name} at other rates", BOTH,
                "Lines: simulated. Marks: measured here. Dashed and level: the objective.",
                percentile_by_rate(tables, metric, slo=slo),
            )  # fmt: skip
        yield Shown(
            "pareto", "What a user gets, what a worker gives", BOTH,
            "Tokens a second for one user against tokens a second from one worker, from low rates (below) to high ones "
            "(above). Large marks: measured here.",
            pareto(tables),
        )  # fmt: skip
    if outcome.pays is not None:
        pays = outcome.pays
        yield Shown(
            "pays", "When disaggregation pays", MODELLED,
            "How many points more (blue) or fewer (orange) requests are in time with "
            f"{pays.split} than collocated, on the same workers, for other rates and lengths; promises stay as they "
            "are. Each cell is one simulation: differences of a few points are chance.",
            pays_map(
                pays.rates, pays.variants, pays.gain, f"points of requests within {words(slo)}",
                ("collocated", pays.split),
            ),
        )  # fmt: skip


def regret_figure() -> Iterator[Shown]:
    """How far strategies stay behind hindsight, from a record; nothing if there is none."""
    if (record := recorded_regret()) is None:
        return
    date = record["provenance"][-1]["date"][:10]
    cost, workers = record["settings"]["cost_model"], record["settings"]["workers"]
    yield Shown(
        "regret", "How good could any routing be?", f"modelled, recorded {date}",
        f"Not of this machine: {workers} workers with the cost model {cost}, other requests and promises in each cell. "
        "The oracle knows every request beforehand; what a strategy lacks to its goodput is its regret.",
        regret_view(record, f"{workers} workers, {cost} (modelled)"),
    )  # fmt: skip


def save_figures(figures: list[Shown], folder: Path) -> None:
    """Each as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for each in figures:
        if isinstance(each.figure, LabFigure):
            (folder / f"{each.name}.png").write_bytes(png(each.figure))
