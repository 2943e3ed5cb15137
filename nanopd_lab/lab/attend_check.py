"""The check of attention over pages. A wrong answer is compared with those of known mistakes, to say which it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nanopd_lab.kv import blocks_for
from nanopd_lab.lab.described import Case, Tensor, close, numbers, one_thread

LAYERS, LAYER = 3, 1


def make_pool(
    context: int, block_size: int, kv_heads: int, dim: int, seed: int, poison: float = float("nan")
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence's K and V in a pool of three layers; whatever is not its own holds `poison`.

    Returns:
        layer view `[blocks, 2, kv_heads, block_size, dim]`, block table int32 with two entries too many, and
        the K and V that are in it, `[2, kv_heads, context, dim]`
    """
    generator = torch.Generator().manual_seed(seed)
    needed = blocks_for(context, block_size)
    order = torch.randperm(needed + 2, generator=generator)
    content = torch.randn(2, kv_heads, context, dim, generator=generator)
    pool = torch.full((needed + 2, LAYERS, 2, kv_heads, block_size, dim), poison)
    for position in range(context):
        block = order[position // block_size]
        pool[block, LAYER, :, :, position % block_size] = content[:, :, position]
    table = torch.cat([order[:needed], torch.zeros(2, dtype=torch.int64)]).to(torch.int32)
    return pool[:, LAYER], table, content


@dataclass(frozen=True)
class Problem:
    """One sequence: its last `tokens` of `context` attend."""

    tokens: int
    context: int
    block_size: int = 4
    heads: int = 2
    kv_heads: int = 2
    dim: int = 4
    dtype: torch.dtype = torch.float32
    scale: float = 0.5
    poison: float = float("nan")
    large: float = 1.0

    @property
    def tolerance(self) -> float:
        if self.dtype == torch.bfloat16:
            return 3e-2
        return 1e-5 if self.large == 1 else 1e-3

    @property
    def lines(self) -> tuple[str, str]:
        first = self.context - self.tokens
        where = f"position {first}" if self.tokens == 1 else f"positions {first} to {self.context - 1}"
        tokens = (
            f"{self.tokens} query token(s) at {where}; {self.context} tokens, blocks of {self.block_size}"
        )
        heads = f"{self.heads} heads, {self.kv_heads} KV heads, head_dim {self.dim}, scale {self.scale:.3g}"
        return tokens, f"{heads}, {self.dtype}{', large scores' if self.large > 1 else ''}"


def _problems() -> Iterator[Problem]:
    nan, huge = float("nan"), 3e4
    for context in (1, 2, 3, 4, 5, 7, 8, 9, 12, 13):
        yield Problem(1, context, heads=1, kv_heads=1, dim=2, poison=nan)
    for tokens, context in (
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 5),
        (9, 9),
        (1, 6),
        (2, 5),
        (2, 7),
        (3, 9),
        (4, 8),
        (4, 12),
        (5, 18),
    ):
        for poison in (nan, huge):
            yield Problem(tokens, context, heads=1, kv_heads=1, dim=2, poison=poison)
            yield Problem(tokens, context, heads=4, kv_heads=2, poison=poison, scale=0.3)
            yield Problem(tokens, context, heads=6, kv_heads=2, block_size=3, scale=1.7, poison=poison)
            yield Problem(tokens, context, heads=3, kv_heads=1, block_size=1, poison=poison)
            yield Problem(tokens, context, heads=2, kv_heads=2, block_size=2, large=300, poison=poison)
    for tokens, context in ((1, 1), (1, 17), (1, 32), (16, 16), (17, 33), (1, 150), (20, 52)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            yield Problem(tokens, context, 16, 9, 3, 16, dtype, 0.25, huge)
        yield Problem(tokens, context, 16, 9, 3, 16, torch.float32, 0.25, nan, large=300)
    yield Problem(2, 1030, 16, 2, 1, 4, poison=nan)
    yield Problem(70, 150, 32, 2, 1, 64, scale=0.125, poison=nan)


@one_thread()
def check_attend(impl: Callable[..., Tensor]) -> int:
    """Decode tokens, whole prompts and chunks, of sizes that divide and that don't, against dense float64."""
    count = 0
    for number, problem in enumerate(_problems()):
        count += 1
        layer, table, content = make_pool(
            problem.context, problem.block_size, problem.kv_heads, problem.dim, number, problem.poison
        )
        generator = torch.Generator().manual_seed(1000 + number)
        # Heads first and transposed, which is how queries come out of the model.
        query = torch.randn(problem.heads, problem.tokens, problem.dim, generator=generator).transpose(0, 1)
        _attend_once(
            impl,
            problem,
            (query * problem.large).to(problem.dtype),
            (layer.to(problem.dtype)),
            table,
            content,
        )
    return count


def _attend_once(
    impl: Any, problem: Problem, query: Tensor, layer: Tensor, table: Tensor, content: Tensor
) -> None:
    case = Case(
        getattr(impl, "__name__", "attend_pages"),
        (
            *problem.lines,
            f"block table {table.tolist()[:8]}, padded; slots that are not its own hold {problem.poison:g}",
        ),
        f"query, kv_layer, block_table, {problem.context}, scale",
    )
    got = case.call(
        impl, query=query, kv_layer=layer, block_table=table, context_len=problem.context, scale=problem.scale
    )
    case.expect_tensor(got, tuple(query.shape), query.dtype, "the result")
    keys, values = content.to(problem.dtype).double()
    want = dense(query.double(), keys, values, problem)
    error = (got.double() - want).abs()
    wrong = ~(error < problem.tolerance)
    if wrong.any():
        row, head, _ = wrong.nonzero()[0].tolist()
        show = f"row {row}, head {head}: "
        texts = [show + numbers(part[row, head]) for part in (got, want)]
        why = _why_attend(got.double(), query.double(), keys, values, problem)
        raise case.wrong(texts[0], texts[1], why)


def dense(query: Tensor, keys: Tensor, values: Tensor, problem: Problem, **mistake: Any) -> Tensor:
    """Dense attention in the type of its inputs, `[tokens, heads, dim]`; `mistake` replaces what is right.

    Args:
        query: `[tokens, heads, dim]`
        keys, values: `[kv_heads, context, dim]`
    """
    tokens, context = problem.tokens, problem.context
    group = problem.heads // problem.kv_heads
    serves = mistake.get("serves") or [head // group for head in range(problem.heads)]
    own = torch.arange(context - tokens, context)[:, None]
    position = torch.arange(context)
    visible = mistake.get("visible", position <= own)
    scores = mistake.get("scale", problem.scale) * torch.einsum("thd,hcd->htc", query, keys[serves])
    scores = scores.masked_fill(~visible, float("-inf"))
    if "page" in mistake:  # each page relative to the maximum as it was then
        end = (position // mistake["page"] + 1) * mistake["page"] - 1
        then = scores.cummax(-1).values[..., end.clamp(max=context - 1)]
        weights = (scores - then).exp()
        weights = weights / weights.sum(-1, keepdim=True)
    else:
        weights = scores.softmax(-1)
    return torch.einsum("htc,hcd->thd", weights, values[serves])


def _why_attend(got: Tensor, query: Tensor, keys: Tensor, values: Tensor, problem: Problem) -> str:
    """The mistake whose answer this is, if it is a known one."""
    tokens, context, size = problem.tokens, problem.context, problem.block_size
    past = context - tokens
    position, row = torch.arange(context), torch.arange(tokens)[:, None]
    own = past + row
    last_page = (context - 1) // size * size
    views = {
        f"the mask starts at the wrong corner: row i stands at position {past} + i, not at i": position
        <= row,
        f"a query also attends to the {past} token(s) before these": (position >= past) & (position <= own),
        "a query attends to itself as well": position < own,
        "the last page is missing, or the last tokens of it": (position <= own) & (position < last_page),
        "the last token is missing": (position <= own) & (position < context - 1),
        "only the last page counts: are the pages before it lost?": (position <= own)
        & (position >= last_page),
        "only the first page counts": (position <= own) & (position < size),
        "the first page is missing": (position <= own) & (position >= size),
        f"query row i stands at position {past} + i and may not look behind it": (position >= 0) & (row >= 0),
    }
    known = {why: dense(query, keys, values, problem, visible=view) for why, view in views.items()}
    if problem.kv_heads > 1:
        serves = [head % problem.kv_heads for head in range(problem.heads)]
        why = (
            f"query head h reads KV head h // {problem.heads // problem.kv_heads}, not h % {problem.kv_heads}"
        )
        known[why] = dense(query, keys, values, problem, serves=serves)
    for scale in (1.0, problem.dim**-0.5, problem.scale**2, 1 / problem.scale):
        known["the scores are multiplied by `scale`, once"] = dense(query, keys, values, problem, scale=scale)
        if close(got, known["the scores are multiplied by `scale`, once"], problem.tolerance):
            return "the scores are multiplied by `scale`, once"
    known["K and V are swapped: kv_layer[block, 0] is K, kv_layer[block, 1] is V"] = dense(
        query, values, keys, problem
    )
    why = "the pages are summed relative to different maxima: rescale what was summed before"
    known[why] = dense(query, keys, values, problem, page=size)
    causes = [why for why, mistake in known.items() if close(got, mistake, problem.tolerance)]
    if causes:
        return " (or: ".join(causes[:2]) + ")" * (len(causes) > 1)
    if not bool(torch.isfinite(got).all()):
        if problem.large > 1:
            return "not finite: was the running maximum subtracted before `exp`?"
        return "NaN: slots behind the context were read; a weight of 0 does not help, for 0 times NaN is NaN"
    if float(got.abs().max()) > 100:
        return "slots that belong to nobody were read; look at the last page, which may not be full"
    if problem.tokens > 1:
        return "compare one row with dense attention by hand: which positions does it see?"
    return "compare with dense attention over gathered pages: first scores, then weights, then output"
