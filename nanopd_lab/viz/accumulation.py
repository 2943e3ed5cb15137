"""Attention page by page on tensors that the engine really saw: how the running values come to the dense answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanopd_lab.attention.capture import Captured
from nanopd_lab.attention.online import add_page, start
from nanopd_lab.attention.reference import gather_sequence
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, KV, LabFigure, figure

PAGE_COLOURS = (DECODE, "#56B4E9")  # neighbours differ


@dataclass(frozen=True)
class Accumulation:
    """One query row of one head; entry i of the lists is how things stood after page i.

    scores:  `[context]`, scaled
    """

    scores: torch.Tensor
    block_size: int
    maxima: list[float]
    totals: list[float]
    errors: list[float]  # largest difference of output / total from the dense answer

    @property
    def pages(self) -> int:
        return len(self.maxima)


def accumulate(captured: Captured, head: int) -> Accumulation:
    """Do a captured layer's attention again for its last query row, page by page, in float32."""
    query = captured.query[-1, head].float()
    group = captured.query.shape[1] // captured.kv_layer.shape[2]
    keys, values = gather_sequence(captured.kv_layer, captured.block_table, captured.context_len)
    keys, values = keys[head // group].float(), values[head // group].float()
    scores = captured.scale * keys @ query
    dense = torch.softmax(scores.double(), 0) @ values.double()
    size = captured.kv_layer.shape[3]
    running = start(query[None])
    maxima, totals, errors = [], [], []
    for first in range(0, captured.context_len, size):
        running = add_page(running, scores[None, first : first + size], values[first : first + size])
        maxima.append(running.maximum.item())
        totals.append(running.total.item())
        errors.append((running.output[0] / running.total[0] - dense).abs().max().item())
    return Accumulation(scores, size, maxima, totals, errors)


def accumulation_view(layers: Sequence[Captured], layer: int, head: int, page: int) -> LabFigure:
    """Scores and running maximum, normaliser, and distance to the dense answer, after page `page` (0 is the first)."""
    found = accumulate(layers[layer], head)
    page = min(page, found.pages - 1)
    fig = figure(9.6, 6.2)
    scores, totals, errors = fig.subplots(3, 1, height_ratios=(1.5, 1, 1))
    size, context = found.block_size, len(found.scores)
    for number in range(found.pages):
        span = range(number * size, min((number + 1) * size, context))
        seen = number <= page
        colour = PAGE_COLOURS[number % 2]
        scores.bar(
            [*span],
            found.scores[span.start : span.stop].tolist(),
            width=1.0,
            color=colour,
            alpha=1 if seen else 0.15,
        )
    edges = [min((number + 1) * size, context) - 0.5 for number in range(found.pages)]
    scores.step(
        [-0.5, *edges[: page + 1]],
        [found.maxima[0], *found.maxima[: page + 1]],
        where="pre",
        color=ALERT,
        linewidth=2,
        label="running maximum",
    )
    scores.axhline(0, color=FAINT, linewidth=0.8)
    scores.set(
        xlim=(-0.5, context - 0.5),
        xlabel=f"position in the context (one colour a page of {size})",
        ylabel="score",
    )
    scores.set_title(
        f"layer {layer}, head {head}: the newest token's query, after page {page + 1} of {found.pages}",
        loc="left",
        fontsize=11,
    )
    scores.legend(loc="upper left", frameon=False, fontsize=9)
    scores.margins(y=0.18)
    xs = list(range(1, found.pages + 1))
    for ax, series, colour, label in (
        (totals, found.totals, KV, "normaliser"),
        (errors, found.errors, ALERT, "distance to dense\n(largest component)"),
    ):
        ax.plot(xs, series, color=colour, alpha=0.25, linewidth=1.5)
        ax.plot(xs[: page + 1], series[: page + 1], color=colour, marker="o", markersize=4, linewidth=2)
        ax.set(xlim=(0.5, found.pages + 0.5), ylabel=label)
        ax.grid(axis="y", alpha=0.3)
        ax.locator_params(axis="x", integer=True)
    totals.set_ylabel("normaliser\n(sum of exp)")
    errors.set_yscale("log")
    errors.set_xlabel("pages taken in")
    for ax in (scores, totals, errors):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    fig.align_ylabels()
    return fig


def error_by_pages(layers: Sequence[Captured]) -> dict[str, dict[int, list[float]]]:
    """Largest error of two ways to add up a layer's pages, by pages taken in, against dense over those pages.

    "rescaled" is `add_page`; "not rescaled" adds each page relative to the maximum of its own moment. All layers
    and heads, the last query row.
    """
    found: dict[str, dict[int, list[float]]] = {"rescaled": {}, "not rescaled": {}}
    for captured in layers:
        size, group = captured.kv_layer.shape[3], captured.query.shape[1] // captured.kv_layer.shape[2]
        keys, values = gather_sequence(captured.kv_layer, captured.block_table, captured.context_len)
        keys, values = keys.repeat_interleave(group, 0).float(), values.repeat_interleave(group, 0).float()
        query = captured.query[-1, :, None].float()  # [heads, 1, head_dim]
        scores = captured.scale * query @ keys.transpose(1, 2)
        right = wrong = start(query)
        for number, first in enumerate(range(0, captured.context_len, size), 1):
            page = slice(first, first + size)
            right = add_page(right, scores[..., page], values[:, page])
            weights = torch.exp(scores[..., page] - right.maximum)
            wrong = wrong._replace(
                total=wrong.total + weights.sum(-1, keepdim=True),
                output=wrong.output + weights @ values[:, page],
            )
            end = min(first + size, captured.context_len)
            dense = torch.softmax(scores[..., :end].double(), -1) @ values[:, :end].double()
            for name, state in (("rescaled", right), ("not rescaled", wrong)):
                error = (state.output / state.total - dense).abs().max().item()
                found[name].setdefault(number, []).append(error)
    return found


def error_view(layers: Sequence[Captured]) -> LabFigure:
    """Error against dense attention in float64 as a function of the pages taken in; a line a layer."""
    fig = figure(9.6, 4.0)
    ax = fig.subplots()
    looks = {"rescaled": KV, "not rescaled": ALERT}
    for name, by_pages in error_by_pages(layers).items():
        pages = sorted(by_pages)
        for layer in range(len(layers)):
            ax.plot(
                pages, [by_pages[page][layer] for page in pages], color=looks[name], alpha=0.25, linewidth=1
            )
        worst = [max(by_pages[page]) for page in pages]
        ax.plot(pages, worst, color=looks[name], marker="o", linewidth=2.4, label=f"{name}: worst layer")
    ax.set_yscale("log")
    ax.set(xlabel="pages taken in", ylabel="largest error against dense\nattention in float64 (log scale)")
    ax.axhline(torch.finfo(torch.float32).eps, color=INK, linewidth=1, linestyle=":")
    ax.annotate(
        "float32 rounding",
        (pages[-1], torch.finfo(torch.float32).eps),
        textcoords="offset points",
        xytext=(0, -12),
        ha="right",
        fontsize=9,
        color=INK,
    )
    ax.legend(frameon=False, fontsize=9, loc="center right")
    ax.locator_params(axis="x", integer=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)
    return fig
