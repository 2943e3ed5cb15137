"""Where requests go, and why: a rule's map, one decision's terms, and which worker prefilled and decoded when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from nanopd_lab.core import SamplingParams
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.nanopd import NanoPDModel
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.router import Explanation, JobView, Outlook, Role, Slo, WorkerView
from nanopd_lab.router.pair_rule import ByEstimate, Estimate, RouterParts
from nanopd_lab.sim.results import RequestRecord
from nanopd_lab.viz.style import (
    ALERT,
    DECODE,
    FAINT,
    INK,
    KV,
    PREFILL,
    STRATEGIES,
    WAITING,
    LabFigure,
    figure,
)

PROMPTS = np.geomspace(64, 8192, 43).round().astype(int)
LOADS = np.arange(25)
OUTPUT, CONTEXT, BUDGET = 200, 600, 512
MOST_TOKENS = 2.0  # of nanoPD's difference, in output tokens; what is beyond has the last colour
VERDICTS = (
    ("either", "#EDEFF2"),
    ("one only", STRATEGIES["collocated"]),
    ("two only", STRATEGIES["xPyD"]),
    ("neither", FAINT),
)


class TwoRoutes:
    """A prompt beside `load` outputs on the worker that decodes them, or on an idle one that hands it over to that.

    Args:
        kv_bytes: a token
    """

    def __init__(
        self,
        cost: IterationModel,
        link: TransferModel,
        slo: Slo,
        kv_bytes: int,
        parts: RouterParts | None = None,
    ) -> None:
        self.slo = slo
        self._policy = ByEstimate(Outlook(cost, slo, link, 16 * kv_bytes, 16, BUDGET), parts)
        self._idle = WorkerView("w1", Role.MIXED)
        self._moves: dict[int, tuple[Estimate, float]] = {}
        self._paces: dict[int, float] = {}

    def __call__(self, prompt: int, load: int) -> tuple[Estimate, Estimate]:
        """What staying and moving would do."""
        policy, job = self._policy, JobView(prompt, prompt, SamplingParams(max_tokens=2048), 0.0)
        busy = WorkerView("w0", Role.MIXED, decoding=load, decode_tokens=load * (CONTEXT - OUTPUT // 2))
        if prompt not in self._moves:
            self._moves[prompt] = policy.source(job, self._idle, OUTPUT, 0.0), policy.handover(job, OUTPUT)
        if load not in self._paces:
            self._paces[load] = policy.target(busy, OUTPUT)
        (moves, handover_s), tpot_s = self._moves[prompt], self._paces[load]
        stays = policy.source(job, busy, OUTPUT, 0.0)
        return stays._replace(tpot_s=tpot_s), moves._replace(tpot_s=tpot_s + handover_s)


def verdict(stays: Estimate, moves: Estimate, slo: Slo) -> int:
    """Index into VERDICTS: which route keeps all promises."""
    one, two = (not sum(each.missed(slo).values()) for each in (stays, moves))
    return 0 if one and two else 1 if one else 2 if two else 3


def decision_map(
    nanopd: NanoPDModel,
    cost: IterationModel,
    *,
    bandwidth_gbs: float | None = None,
    gamma: float = 1.0,
    prompt: int = 2048,
    load: int = 8,
    ttft_ms: float = 600.0,
    tpot_ms: float = 18.0,
    parts: RouterParts | None = None,
    claim: int | None = None,
) -> LabFigure:
    """One request over prompt length and load: by nanoPD's formulas, and by what promises steps would keep.

    Args:
        bandwidth_gbs: of the link, GB/s; None: what nanoPD's parameters say
        gamma: factor on nanoPD's γ
        prompt, load: the point that is looked at closely
        parts: of the estimates; the package's own if omitted
        claim: load from which on the published heat map splits, drawn as a line
    """
    bytes_per_s = nanopd.bytes_per_s if bandwidth_gbs is None else 1e9 * bandwidth_gbs
    rule = replace(nanopd, bytes_per_s=bytes_per_s, gamma_s=gamma * nanopd.gamma_s)
    link, slo = TransferModel(0.0, 0.0, bytes_per_s), Slo(ttft_ms / 1e3, tpot_ms / 1e3)
    routes = TwoRoutes(cost, link, slo, rule.kv_bytes_per_token, parts)
    gains = [
        [
            rule.collocated_seconds(p, OUTPUT, n) - rule.disaggregated_seconds(p, OUTPUT, max(0, n - 1))
            for p in PROMPTS.tolist()
        ]
        for n in LOADS.tolist()
    ]
    verdicts = [[verdict(*routes(p, n), slo) for p in PROMPTS.tolist()] for n in LOADS.tolist()]
    fig = figure(9.6, 5.2)
    left, right = fig.subplots(1, 2, sharey=True)
    tokens = np.array(gains) / rule.beta_s
    shown = left.pcolormesh(
        PROMPTS, LOADS, np.clip(tokens, -MOST_TOKENS, MOST_TOKENS), cmap="PuOr", vmin=-MOST_TOKENS,
        vmax=MOST_TOKENS, shading="nearest", rasterized=True,
    )  # fmt: skip
    split = (tokens > 0).any(axis=1)
    if split.any() and not split.all():
        left.axhline(int(np.argmax(split)) - 0.5, color=INK, linewidth=2)
    if claim is not None:
        left.axhline(claim - 0.5, color=INK, linewidth=1.4, linestyle=":")
        left.text(
            70, claim - 0.4, " published: two workers from here on", fontsize=8.5, color=INK, va="bottom"
        )
    bar = fig.colorbar(shown, ax=left, location="bottom", shrink=0.9, pad=0.02)
    bar.set_label("two workers are quicker by so many output tokens (of 200)", fontsize=9)
    chosen = right.pcolormesh(
        PROMPTS, LOADS, np.array(verdicts), shading="nearest", rasterized=True,
        cmap=ListedColormap([colour for _, colour in VERDICTS]), norm=BoundaryNorm(np.arange(-0.5, 4), 4),
    )  # fmt: skip
    key = fig.colorbar(chosen, ax=right, location="bottom", shrink=0.9, pad=0.02, ticks=range(4))
    key.ax.set_xticklabels([name for name, _ in VERDICTS], fontsize=9)
    key.ax.tick_params(length=0, which="both")
    key.set_label("promises are kept by", fontsize=9)
    gain = rule.collocated_seconds(prompt, OUTPUT, load) - rule.disaggregated_seconds(
        prompt, OUTPUT, max(0, load - 1)
    )
    words = "two workers" if gain > 0 else "one worker"
    left.set_title(
        f"nanoPD's rule at ×: {words},\nby {abs(gain) / rule.beta_s:.2f} of {OUTPUT} output tokens\n(line: where it "
        "changes its mind)", loc="left", fontsize=10.5,
        color=INK,
    )  # fmt: skip
    stays, moves = routes(prompt, load)
    right.set_title(
        f"a model of steps at ×:\none worker {_told(stays)}\ntwo workers {_told(moves)}",
        loc="left",
        fontsize=10.5,
        color=INK,
    )
    for ax in (left, right):
        ax.plot(prompt, load, "x", color=INK, markersize=11, markeredgewidth=2.5, clip_on=False)
        ax.set_xscale("log")
        ax.set_xlim(PROMPTS[0], PROMPTS[-1])
        ax.set_xticks([64, 256, 1024, 4096])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel("prompt (tokens)")
    left.set_ylabel("outputs that the worker decodes")
    return fig


def _told(each: Estimate) -> str:
    others = f", others {1e3 * each.after_s:.0f}" if each.outputs else ""
    return f"{each.ttft_s:.2f} s, {1e3 * each.tpot_s:.0f} ms/token{others}"


def explanation_view(explanation: Explanation, title: str, unit: str = "expected misses") -> LabFigure:
    """What each candidate's cost consists of; the chosen route is on top."""
    candidates = explanation.candidates[:9]
    fig = figure(9.6, 1.5 + 0.34 * len(candidates))
    ax = fig.add_subplot()
    names = list(dict.fromkeys(name for each in candidates for name, value in each.terms.items() if value))
    colours = [PREFILL, DECODE, KV, ALERT, "#CC79A7", "#56B4E9", WAITING, FAINT]
    assert len(names) <= len(colours), f"{len(names)} terms, and {len(colours)} colours to tell them apart"
    for row, each in enumerate(candidates):
        left = 0.0
        for name, colour in zip(names, colours, strict=False):
            width = each.terms.get(name, 0.0)
            ax.barh(row, width, left=left, color=colour, edgecolor="white", linewidth=0.6)
            left += width
        ax.text(left, row, f" {each.cost:.3g}", va="center", fontsize=9.5, color=INK)
    routes = [str(each.route) for each in candidates]
    ax.set_yticks(range(len(routes)), [f"{routes[0]}  chosen", *routes[1:]])
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.margins(x=0.08)
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    handles = [
        Patch(facecolor=colour, label=name.replace("_", " "))
        for name, colour in zip(names, colours, strict=False)
    ]
    fig.legend(
        handles=handles, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=9.5
    )
    ax.spines[["top", "right"]].set_visible(False)
    return fig


def lanes(records: Sequence[RequestRecord], title: str, edges_s: Sequence[float] = ()) -> LabFigure:
    """Each request twice, when it came: above the line of its prompt's worker, below that of its output's.

    Args:
        edges_s: where the workload changes
    """
    routes = [(each.arrival, each.path.route) for each in records if each.path and each.path.route]
    workers = sorted({name for _, route in routes for name in route})
    fig = figure(9.6, 0.9 + 0.6 * len(workers))
    ax = fig.add_subplot()
    for row, name in enumerate(workers):
        ax.axhline(row, color=WAITING, linewidth=0.8)
        _ticks(ax, [at for at, route in routes if route.prefill == name], row - 0.2, PREFILL)
        _ticks(ax, [at for at, route in routes if route.decode == name], row + 0.2, DECODE)
    for edge in edges_s:
        ax.axvline(edge, color=INK, linewidth=1, linestyle="--")
    ax.set_yticks(range(len(workers)), workers)
    ax.set_ylim(len(workers) - 0.5, -0.5)
    ax.set_xlabel("arrival (s)")
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    handles = [Patch(facecolor=PREFILL, label="its prompt"), Patch(facecolor=DECODE, label="its output")]
    ax.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9.5)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return fig


def _ticks(ax: Axes, times: Sequence[float], row: float, colour: str) -> None:
    ax.eventplot([times or [np.nan]], lineoffsets=row, linelengths=0.34, linewidths=1.1, colors=colour)
