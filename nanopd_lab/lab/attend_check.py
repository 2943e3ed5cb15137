"""The check of attention over pages. A wrong answer is compared with those of known mistakes, to say which it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nanopd_lab.kv import blocks_for
from nanopd_lab.lab.described import Case, Earlier, Tensor, close, one_thread, two_numbers

LAYERS, LAYER = 3, 1
NO_BLOCK = 9999  # pads block tables: whoever looks there finds out


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
    table = torch.cat([order[:needed], torch.full((2,), NO_BLOCK)]).to(torch.int32)
    return pool[:, LAYER], table, content


STRANGE_SLOTS = (
    "NaN: slots were read that are not its own, behind the context or in another block; a weight of 0 does not "
    "help, for 0 times NaN is NaN"
)
NO_SCORE = "NaN from -inf - -inf or 0 / 0: a row that sees nothing of a page, or nothing at all"
COMPARE = "compare one row with dense attention by hand: scores, then weights, then output"


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

    def limit(self, want: Tensor) -> Tensor:
        """How far each number may be off: what is computed in float32 is rounded once, at the end."""
        rounding = 2.0**-8 if self.dtype == torch.bfloat16 else 0.0
        return rounding * want.abs() + (1e-5 if self.large == 1 else 1e-3)

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
    count, earlier = 0, Earlier()
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
            earlier,
        )
    return count


def _attend_once(
    impl: Any,
    problem: Problem,
    query: Tensor,
    layer: Tensor,
    table: Tensor,
    content: Tensor,
    earlier: Earlier,
) -> None:
    case = Case(
        getattr(impl, "__name__", "attend_pages"),
        (
            *problem.lines,
            f"block table {table.tolist()[:8]}, padded; slots that are not its own hold {problem.poison:g}",
        ),
        f"query, kv_layer, block_table, {problem.context}, scale",
    )
    inputs = {"query": query, "block_table": table, "context_len": problem.context, "scale": problem.scale}
    got = case.call(impl, kv_layer=layer, **inputs)
    earlier.compare(case, got)
    case.expect_tensor(got, tuple(query.shape), query.dtype, "the result")
    keys, values = content.to(problem.dtype).double()
    want = dense(query.double(), keys, values, problem)
    error = (got.double() - want).abs()
    wrong = ~(error < problem.limit(want))
    if wrong.any():
        row, head, _ = wrong.nonzero()[0].tolist()
        show = f"row {row}, head {head}: "
        texts = [show + text for text in two_numbers(got[row, head], want[row, head])]
        if bool(got.isnan().any()) and problem.large == 1:
            clean = case.call(impl, kv_layer=layer.nan_to_num(0), **inputs)
            why = STRANGE_SLOTS if bool(torch.isfinite(clean).all()) else NO_SCORE
        else:
            why = _why_attend(got.double(), query.double(), keys, values, problem)
            if why == COMPARE:
                why = _which_row(got[row, head].double(), row, head, query.double(), keys, values, problem)
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
        if mistake.get("right_total"):
            weights = (scores - then).exp() / (scores - scores.amax(-1, keepdim=True)).exp().sum(
                -1, keepdim=True
            )
    elif mistake.get("undivided"):
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
    else:
        weights = scores.softmax(-1)
    return torch.einsum("htc,hcd->thd", weights, values[serves])


def _why_attend(got: Tensor, query: Tensor, keys: Tensor, values: Tensor, problem: Problem) -> str:
    """The mistake whose answer this is, if it is a known one."""
    if problem.dtype == torch.bfloat16 and close(got, dense(query, keys, values, problem), problem.tolerance):
        return "rounded on the way: compute in float32, and go back to the query's type once, at the end"
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
    why = "the total was rescaled to the new maximum, but not the weighted sum of values"
    known[why] = dense(query, keys, values, problem, page=size, right_total=True)
    known["divide by the total once, after the last page"] = dense(
        query, keys, values, problem, undivided=True
    )
    causes = [why for why, mistake in known.items() if close(got, mistake, problem.tolerance)]
    if causes:
        return " (or: ".join(causes[:2]) + ")" * (len(causes) > 1)
    if not bool(torch.isfinite(got).all()):
        return "not finite: was the running maximum subtracted before `exp`?"
    if float(got.abs().max()) > 100:
        return "slots that belong to nobody were read; look at the last page, which may not be full"
    return COMPARE


def _which_row(
    got: Tensor, row: int, head: int, query: Tensor, keys: Tensor, values: Tensor, problem: Problem
) -> str:
    """Whether that row is right for another row or head, or for another number of positions."""
    mixed_up = "were rows and heads mixed up, when folding or when unfolding?"
    want = dense(query, keys, values, problem)
    for other in range(problem.tokens):
        for other_head in range(problem.heads):
            if close(got, want[other, other_head], problem.tolerance):
                return f"that is right for row {other}, head {other_head}: {mixed_up}"
    own = problem.context - problem.tokens + row
    for seen in range(1, problem.context + 1):
        visible = (torch.arange(problem.context) < seen).expand(problem.tokens, -1)
        if close(got, dense(query, keys, values, problem, visible=visible)[row, head], problem.tolerance):
            sees = f"this row sees positions 0 to {seen - 1}, and should see 0 to {own}"
            return f"{sees}: does the mask have the rows in the same order as the scores?"
    return COMPARE
