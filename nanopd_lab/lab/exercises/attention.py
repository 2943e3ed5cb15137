"""Exercises on paged attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from nanopd_lab.attention.online import OnlineBackend, Running, add_page, attend_pages, start
from nanopd_lab.attention.reference import gather_sequence
from nanopd_lab.lab.attend_check import check_attend, make_pool
from nanopd_lab.lab.described import Case, Earlier, Tensor, close, numbers, one_thread, two_numbers
from nanopd_lab.lab.registry import Exercise

# ---------------------------------------------------------------------- gather


@one_thread()
def check_gather(impl: Callable[..., tuple[Tensor, Tensor]]) -> int:
    """Contexts of every length up to four blocks; then real sizes. What is not the sequence's own is poisoned."""
    shapes = [(context, size, 1, 2) for size in (4, 2, 1, 3) for context in range(1, 4 * size + 1)]
    shapes += [(context, 4, kv_heads, 3) for context in (3, 4, 5, 8, 11) for kv_heads in (2, 3)]
    shapes += [(context, 16, 3, 64) for context in (1, 15, 16, 17, 160, 301)]
    count, earlier = 0, Earlier()
    for number, (context, size, kv_heads, dim) in enumerate(shapes):
        for dtype, poison in ((torch.float32, float("nan")), (torch.bfloat16, 1e4)):
            count += 1
            layer, table, content = make_pool(context, size, kv_heads, dim, number, poison)
            layer, content = layer.to(dtype), content.to(dtype)
            _gather_once(impl, layer, table, context, content, earlier)
    return count


def _gather_once(
    impl: Any, layer: Tensor, table: Tensor, context: int, content: Tensor, earlier: Earlier
) -> None:
    size = layer.shape[3]
    case = Case(
        getattr(impl, "__name__", "gather"),
        (
            f"{context} token(s) in blocks of {size}, block table {table.tolist()[:8]}, padded",
            f"kv_layer = Tensor{list(layer.shape)}: [num_blocks, 2, kv_heads, block_size, head_dim]",
        ),
        f"kv_layer, block_table, context_len={context}",
    )
    got = case.call(impl, kv_layer=layer, block_table=table, context_len=context)
    earlier.compare(case, got)
    pair = isinstance(got, (tuple, list)) and len(got) == 2
    case.expect(pair, type(got).__name__, "(K, V)", "return two tensors, K and V")
    for name, found, want in zip("KV", got, content, strict=True):
        case.expect_tensor(found, tuple(want.shape), want.dtype, name)
        bad = (found != want).any(-1).any(0)
        if bad.any():
            at = int(bad.nonzero()[0])
            head = int((found[:, at] != want[:, at]).any(-1).nonzero()[0])
            block = int(table[at // size])
            why = f"position {at} is in block {block} = block_table[{at // size}], offset {at % size}"
            other = content[1 - "KV".index(name)]
            why += "; that is the other of K and V" if torch.equal(found, other) else ""
            show = f"{name} of position {at}, head {head}: "
            raise case.wrong(show + numbers(found[head, at]), show + numbers(want[head, at]), why)


# ---------------------------------------------------------------------- one page


@one_thread()
def check_add_page(impl: Callable[[Running, Tensor, Tensor], Running]) -> int:
    """Page after page: a sum that can be done by hand, random ones, masked ones, and scores that overflow."""
    count = 0
    for pages in _page_cases():
        running = start(torch.zeros(*pages[0][0].shape[:-1], pages[0][1].shape[-1], dtype=pages[0][0].dtype))
        for number, (scores, values) in enumerate(pages):
            count += 1
            running = _add_once(impl, number, running, scores, values)
    return count


def _page_cases() -> Iterator[list[tuple[Tensor, Tensor]]]:
    one = torch.tensor
    yield [
        (one([[0.0, 1.0]]), one([[1.0], [2.0]])),
        (one([[3.0, 0.0]]), one([[4.0], [8.0]])),  # a larger maximum: what was before shrinks
        (one([[2.0]]), one([[1.0]])),  # a smaller one
    ]
    yield [(one([[-5.0]]), one([[1.0, 2.0]])), (one([[-7.0]]), one([[3.0, 5.0]]))]  # all below zero
    yield [(one([[200.0, 100.0]]), one([[1.0], [2.0]])), (one([[300.0]]), one([[5.0]]))]
    hidden = float("-inf")
    yield [(one([[-1000.0, hidden, -1001.0]]), one([[1.0], [2.0], [3.0]])), (one([[-999.0]]), one([[5.0]]))]
    yield [(one([[1.0, hidden], [0.0, 2.0]]), one([[1.0], [2.0]])), (one([[hidden], [1.0]]), one([[7.0]]))]
    generator = torch.Generator().manual_seed(0)
    for sizes in ([4, 4, 4, 1], [1, 1, 1], [16, 16, 5], [40, 7], [3], [2] * 9):
        for lead in ((1,), (3,), (2, 5), (3, 1)):
            for spread, dtype in ((1.0, torch.float32), (150.0, torch.float32), (3.0, torch.float64)):
                pages = []
                for number, size in enumerate(sizes):
                    scores = (spread * torch.randn(*lead, size, generator=generator)).to(dtype)
                    if number and size > 1:  # the tail of a causal mask
                        scores[..., 0, -1] = hidden
                    values = torch.randn(*lead[:-1], size, 6, generator=generator).to(dtype)
                    pages.append((scores, values))
                yield pages


def _add_once(impl: Any, number: int, running: Running, scores: Tensor, values: Tensor) -> Running:
    fields = ", ".join(f"{name} {numbers(value)}" for name, value in running._asdict().items())
    case = Case(
        getattr(impl, "__name__", "add_page"),
        (
            f"page {number}; until now {fields}",
            f"scores {list(scores.shape)} = {numbers(scores)}, values {list(values.shape)} = {numbers(values)}",
        ),
        "running, scores, values",
    )
    got = case.call(impl, running=running, scores=scores, values=values)
    case.expect(
        isinstance(got, Running), type(got).__name__, "Running(maximum, total, output)", "return a Running"
    )
    before = Running(*(part.double() for part in running))
    want = add_page(before, scores.double(), values.double())
    for name, have, need, old in zip(Running._fields, got, want, running, strict=True):
        case.expect_tensor(have, tuple(old.shape), old.dtype, name)
        error = (have.double() - need).abs() / need.abs().clamp(min=1)
        if not bool((error < 3e-5).all()):
            row = int((~(error < 3e-5)).flatten(0, -2).any(-1).nonzero()[0])
            show = f"{name}{f', row {row}' if old.shape[-2] > 1 else ''} "
            texts = [
                show + text for text in two_numbers(*(part.flatten(0, -2)[row] for part in (have, need)))
            ]
            why = _why_page(name, have, before, scores.double(), values.double())
            raise case.wrong(texts[0], texts[1], why)
    return Running(*(part.to(old.dtype) for part, old in zip(want, running, strict=True)))


def _why_page(name: str, have: Tensor, before: Running, scores: Tensor, values: Tensor) -> str:
    page = scores.amax(-1, keepdim=True)
    if name == "maximum":
        return "the largest score of all pages up to this one"
    if not bool(torch.isfinite(have).all()):
        if bool(page.isneginf().any()):
            return (
                "a row sees nothing of this page, and -inf - -inf is NaN: subtract the maximum of all pages"
            )
        return "not finite: subtract the maximum before `exp`, so that the largest exponent is 0"
    now = torch.maximum(before.maximum, page)
    shrink = torch.exp(before.maximum - now)
    weights = torch.exp(scores - now)
    old, new = (
        (before.total, weights.sum(-1, keepdim=True))
        if name == "total"
        else (before.output, weights @ values)
    )
    known = {
        "what was summed before is relative to the old maximum: multiply it by exp(old maximum - new maximum)": old
        + new,
        "the page's own exponentials must be relative to the new maximum of all pages, not to the page's": old
        * shrink
        + new * torch.exp(now - page),
        "what the pages before have left is lost": new,
        "the page itself is not added": old * shrink,
        "the factor is exp(old maximum - new maximum), not its inverse": old / shrink + new,
        "`output` is not divided here: dividing by `total` comes once, after the last page": (
            old * shrink + new
        )
        / (before.total * shrink + weights.sum(-1, keepdim=True)),
    }
    for why, mistake in known.items():
        if close(have.double(), mistake, 3e-5):
            return why
    return f"{name} = {name} * exp(old maximum - new maximum) + the page's part, relative to the new maximum"


EXERCISES = (
    Exercise(
        name="attention.gather",
        notebook="03",
        reference=gather_sequence,
        check=check_gather,
        hints=(
            "Picking the sequence's blocks out of the pool is one indexing operation. Then the block and the "
            "offset in the block must become one dimension: the position.",
            "`kv_layer[ids]` with the first ceil(context_len / block_size) ids is [blocks, 2, kv_heads, "
            "block_size, head_dim]. Bring `blocks` next to `block_size` with `permute`, join the two with "
            "`reshape`, and cut off what is behind the context.",
            "`pages = kv_layer[block_table[:blocks].long()]`; `flat = pages.permute(1, 2, 0, 3, 4).reshape(2, "
            "kv_heads, -1, head_dim)`; return `flat[0, :, :context_len], flat[1, :, :context_len]`.",
        ),
    ),
    Exercise(
        name="attention.add_page",
        notebook="03",
        reference=add_page,
        check=check_add_page,
        hints=(
            "All sums are relative to one maximum. When a page brings a larger one, the old sums must be "
            "expressed relative to it before anything is added.",
            "New maximum: of the old one and the page's largest score. `shrink = exp(old - new)` is 1 if nothing "
            "changed. Both `total` and `output` shrink by it, and both get the page's part on top.",
            "`maximum = torch.maximum(running.maximum, scores.amax(-1, keepdim=True))`; `shrink = "
            "torch.exp(running.maximum - maximum)`; `weights = torch.exp(scores - maximum)`; return "
            "`Running(maximum, running.total * shrink + weights.sum(-1, keepdim=True), running.output * shrink + "
            "weights @ values)`.",
        ),
    ),
    Exercise(
        name="attention.attend_pages",
        notebook="03",
        reference=attend_pages,
        check=check_attend,
        hints=(
            "One loop over the pages of the sequence. Each page gives scores, hides what a row may not see, and "
            "goes into `add_page`. Divide once, at the end.",
            "Put the query heads that share a KV head under one another: [kv_heads, group * tokens, head_dim]; "
            "then one matrix product serves all heads. Page p holds positions p * block_size and up; read only "
            "`context_len - p * block_size` slots of it. Row i of the query stands at `context_len - tokens + i`.",
            "`rows = query.reshape(tokens, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)`. "
            "For `first` in `range(0, context_len, block_size)`: `keys, values = kv_layer[block_table[first // "
            "block_size], :, :, : context_len - first].float()`; scores; `masked_fill(position > seen[:, None], "
            "-inf)` with `seen = torch.arange(context_len - tokens, context_len).repeat(group)`; `add_page`. Then "
            "undo the folding.",
        ),
        plug=lambda parts, impl: replace(parts, attention=OnlineBackend(impl)),
    ),
)
