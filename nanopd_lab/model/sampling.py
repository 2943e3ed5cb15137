"""From logits to tokens, vectorised over the batch.

Every row draws two uniform numbers from a counter-based generator, a pure function of (seed, sample, position):
the first draws a run of about sqrt(vocabulary) tokens, the second a token in it, each by inverting a cumulative
distribution. So a request's tokens do not depend on which other requests share its batch, on how often it was
preempted, or on the device.

Logits of the same tokens do depend on those, in their last bits. With one number for the whole vocabulary that moved
the ends of tens of thousands of unlikely tokens by a good part of their width, and one draw in a hundred was another
token; now an end moves by a millionth of the few hundred that there are.

top_k and top_p are turned into one threshold a row: a token is kept if its logit reaches it (ties stay in, as
in Hugging Face's top-k filter), which makes the kept set independent of how a sort breaks ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from nanopd_lab.core import Logprob, SampledToken, SamplingParams
from nanopd_lab.kernels import gpu
from nanopd_lab.kernels.selection import top_p_threshold
from nanopd_lab.model.batch import to_device

# Without the CUDA kernel top_p first looks at this many of the most likely tokens and sorts the whole vocabulary only
# if their probability does not reach top_p.
TOP_P_SHORTLIST = 1024
_MASK = (1 << 64) - 1


class SamplingRow(NamedTuple):
    """One draw: from row `logits_row` of the logits, for output position `position` of sample `sample`."""

    params: SamplingParams
    logits_row: int
    seed: int
    sample: int
    position: int
    banned: tuple[int, ...] = ()  # stop tokens, while the output is shorter than min_tokens


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): 64 well-mixed bits of an int, or of each of an array."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: Any, sample: Any, position: Any) -> Any:
    """A number in [0, 1) that depends on its arguments alone: integers, or arrays of uint64."""
    return (_mix(_mix(_mix(seed & _MASK) ^ sample) ^ position) >> 11) * 2.0**-53


def request_seed(engine_seed: int, serial: int) -> int:
    """The seed of a request that brought none: differs between requests, repeats with the engine's seed."""
    return _mix(_mix(engine_seed & _MASK) ^ (serial + 1))


class Recipe:
    """How a batch of rows is sampled, as columns on the device.

    Made from the rows once and used for as long as the same sequences go on: only their positions change then.
    """

    def __init__(self, rows: Seq[SamplingRow], vocab: int, device: torch.device) -> None:
        self.rows = rows
        params = [row.params for row in rows]
        self.positions = np.array([row.position for row in rows], np.uint64)
        self.banned = {number: list(row.banned) for number, row in enumerate(rows) if row.banned}
        self.logits_rows = _places([row.logits_row for row in rows], len(rows), device)
        hot = [number for number, each in enumerate(params) if not each.greedy]
        self.num_drawn = len(hot)
        self.drawn = _places(hot, len(rows), device)
        self.logprobs = [number for number, each in enumerate(params) if each.logprobs is not None]
        self.num_logprobs = max([params[number].logprobs or 0 for number in self.logprobs], default=0)
        self.logprobs_index = to_device(self.logprobs, torch.int64, device) if self.logprobs else None
        if hot:
            self._draws = np.array(hot)
            self._seeds = np.array([rows[number].seed & _MASK for number in hot], np.uint64)
            self._samples = np.array([rows[number].sample for number in hot], np.uint64)
            drawn = [params[number] for number in hot]
            columns = to_device([[max(p.temperature, 1e-6), p.min_p] for p in drawn], torch.float32, device)
            self.temperature = columns[:, 0:1]
            # p >= min_p * p_max, in logits; the maximum is 0.
            self.least = columns[:, 1:2].log() if any(p.min_p > 0 for p in drawn) else None
            self.filters = Filters.of(drawn, vocab, device)

    def move(self, positions: Seq[int]) -> None:
        """The rows are at these positions now."""
        self.positions = np.array(positions, np.uint64)

    def points(self, device: torch.device) -> torch.Tensor:
        """`[D, 2]` float64, the uniform numbers of the rows that are drawn, at `positions`."""
        first = 2 * self.positions[self._draws]
        numbers: Any = np.stack(
            [uniform(self._seeds, self._samples, place) for place in (first, first + 1)], 1
        )
        return to_device(numbers, torch.float64, device)


def _places(rows: list[int], whole: int, device: torch.device) -> torch.Tensor | None:
    """An index of `rows` on the device; None if they are all of `whole`, in order."""
    return None if rows == list(range(whole)) else to_device(rows, torch.int64, device)


@dataclass(frozen=True)
class Drawn:
    """Tokens that have been drawn, on the device; on a GPU they may still be on their way.

    tokens: int64 `[R]` on the device, for the next step's input; whatever, but in range, of logits that are not finite
    """

    tokens: torch.Tensor
    recipe: Recipe
    _host: dict[str, torch.Tensor]
    _arrived: torch.cuda.Event | None

    def result(self) -> list[SampledToken]:
        """One for each row. Waits for the device; a row whose logits are not finite has `error` set."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens = self._host["tokens"].tolist()
        out = list(map(SampledToken, tokens))
        for number, entry in _entries(self._host, tokens, self.recipe):
            out[number] = SampledToken(tokens[number], entry[tokens[number]].logprob, entry)
        if min(tokens) < 0:
            error = "the model returned non-finite logits (NaN or infinity)"
            out = [each if each.token >= 0 else SampledToken(-1, error=error) for each in out]
        return out


def sample(logits: torch.Tensor, rows: Seq[SamplingRow]) -> list[SampledToken]:
    """`draw(...).result()`: draws one token for each row, and waits for them."""
    return draw(logits, Recipe(rows, logits.shape[1], logits.device)).result()


def draw(logits: torch.Tensor, recipe: Recipe) -> Drawn:
    """Draw one token for each row without waiting for the device.

    Args:
        logits: `[L, vocab]`, any float type; several rows may refer to the same logits
        recipe: what to draw
    """
    places = recipe.logits_rows
    logits = logits[: len(recipe.rows)] if places is None else logits.index_select(0, places)
    raw = logits
    if recipe.banned:
        logits = logits.clone()
        for number, banned in recipe.banned.items():
            logits[number, banned] = float("-inf")

    # One pass for all that is greedy: a maximum shows NaN and +infinity too.
    largest, tokens = logits.max(-1)
    if recipe.num_drawn == len(recipe.rows):
        tokens = _draw(logits.float(), recipe)
    elif recipe.drawn is not None and recipe.num_drawn:
        tokens = tokens.index_copy(0, recipe.drawn, _draw(logits[recipe.drawn].float(), recipe))
    # x - x is 0 for finite numbers alone, and takes fewer kernels than `isfinite`.
    marked = tokens.masked_fill(largest - largest != 0, -1)

    found = {"tokens": marked, **_logprobs(raw, tokens, recipe)}
    if logits.device.type != "cuda":
        return Drawn(tokens, recipe, found, None)
    host = {name: _to_pinned(tensor) for name, tensor in found.items()}
    arrived = torch.cuda.Event()
    arrived.record()
    return Drawn(tokens, recipe, host, arrived)


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _draw(logits: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """`[D]` tokens drawn from `[D, vocab]` float32 logits of the rows that are not greedy."""
    vocab = logits.shape[1]
    width = math.isqrt(vocab - 1) + 1
    runs = torch.nn.functional.pad(_weights(logits, recipe), (0, width * width - vocab)).view(
        -1, width, width
    )
    points = recipe.points(logits.device)
    run = _invert(runs.sum(-1, dtype=torch.float64), points[:, :1])
    token = _invert(runs.gather(1, run[:, :, None].expand(-1, 1, width)).squeeze(1).double(), points[:, 1:])
    # NaN logits have no distribution; the row is an error already, and any index in range will do.
    return (run * width + token).squeeze(-1).clamp(max=vocab - 1)


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """`[D, 1]`: where the cumulative sum of `[D, N]` weights passes that part of their total; points lie in [0, 1)."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(points * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)


def _weights(logits: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """`[D, vocab]`: how likely each token is, relative to the likeliest; 0 for those that a filter removes."""
    # A tiny temperature must not overflow: subtract the maximum first.
    scaled = (logits - logits.amax(-1, keepdim=True)) / recipe.temperature
    if recipe.least is not None:
        scaled = scaled.masked_fill(scaled < recipe.least, float("-inf"))
    weights = scaled.exp()
    if recipe.filters is None:
        return weights
    return weights.masked_fill(scaled < recipe.filters.thresholds(scaled, weights), 0.0)


class Filters:
    """top_k and top_p of a batch's rows, as columns on the device."""

    def __init__(self, params: Seq[SamplingParams], vocab: int, device: torch.device) -> None:
        by_k = [i for i, p in enumerate(params) if 0 < p.top_k < vocab]
        by_p = [i for i, p in enumerate(params) if not 0 < p.top_k < vocab and p.top_p < 1.0]
        self.by_k, self.by_p = _places(by_k, len(params), device), _places(by_p, len(params), device)
        self.width = max((params[i].top_k for i in by_k), default=0)
        self.limit = to_device([[params[i].top_k] for i in by_k], torch.int64, device)
        self.top_p_of_k = to_device([[params[i].top_p] for i in by_k], torch.float64, device)
        self.top_p = to_device([[params[i].top_p] for i in by_p], torch.float64, device)

    @classmethod
    def of(cls, params: Seq[SamplingParams], vocab: int, device: torch.device) -> Filters | None:
        """The filters of these rows, or None if there are none."""
        some = any(0 < p.top_k < vocab or p.top_p < 1.0 for p in params)
        return cls(params, vocab, device) if some else None

    def thresholds(self, scaled: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`[R, 1]`: the smallest logit that top_k and then top_p keep; `weights` are `scaled.exp()`."""
        found = torch.full((len(scaled), 1), float("-inf"), device=scaled.device)
        if len(self.limit):
            found = _put(found, self.by_k, self._top_k(_take(scaled, self.by_k)))
        if len(self.top_p):
            weights = _take(weights, self.by_p)
            target = self.top_p * weights.sum(-1, keepdim=True, dtype=torch.float64)
            found = _put(found, self.by_p, _top_p(_take(scaled, self.by_p), weights, target))
        return found

    def _top_k(self, scaled: torch.Tensor) -> torch.Tensor:
        values = scaled.topk(self.width, dim=-1).values  # descending
        rank = torch.arange(self.width, device=scaled.device)
        weight = values.exp().double().masked_fill(rank >= self.limit, 0.0)
        last = _first(weight.cumsum(-1) >= self.top_p_of_k * weight.sum(-1, keepdim=True))
        last = torch.where(self.top_p_of_k < 1.0, last, self.width - 1).minimum(self.limit - 1)
        return values.gather(-1, last)


def _top_p(scaled: torch.Tensor, weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[R, 1]`: the largest logit at which the sum of weights, the likeliest token first, reaches the target."""
    if scaled.is_cuda and gpu.can_compile():
        return top_p_threshold(scaled, weights, target)
    width = min(TOP_P_SHORTLIST, scaled.shape[1])
    while True:
        values = scaled.topk(width, dim=-1).values
        reached = values.exp().double().cumsum(-1) >= target
        # On a CPU nobody waits for the answer.
        if width == scaled.shape[1] or bool(reached.any(-1).all()):
            return values.gather(-1, _first(reached))
        width = scaled.shape[1]


def _first(reached: torch.Tensor) -> torch.Tensor:
    """`[R, 1]`: the first place of each row that is True, or the last of all."""
    return torch.where(reached.any(-1), reached.int().argmax(-1), reached.shape[1] - 1)[:, None]


def _take(rows: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """`rows[index]`; all of them as they are if it is None."""
    return rows if index is None else rows.index_select(0, index)


def _put(rows: torch.Tensor, index: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """`rows` with `values` at `index`; the values if it is None."""
    return values if index is None else rows.index_copy(0, index, values)


def _logprobs(raw: torch.Tensor, tokens: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Log-probabilities of the raw distribution for the rows that asked: the top ones and the token drawn.

    `own` and `own_rank` `[W]`, `top` and `top_ids` `[W, width]`, for the W rows with `logprobs`; else nothing.
    """
    index = recipe.logprobs_index
    if index is None:
        return {}
    logprobs = raw.index_select(0, index).float().log_softmax(-1)
    own = logprobs.gather(-1, tokens.index_select(0, index)[:, None])
    width = min(recipe.num_logprobs, logprobs.shape[1])
    top = logprobs.topk(max(width, 1), dim=-1)
    rank = (logprobs > own).sum(-1) + 1
    return {"own": own.squeeze(-1), "own_rank": rank, "top": top.values, "top_ids": top.indices}


def _entries(
    host: dict[str, torch.Tensor], tokens: list[int], recipe: Recipe
) -> Iterator[tuple[int, dict[int, Logprob]]]:
    """(row, the log-probabilities of `_logprobs` as its request asked for them)."""
    if not recipe.logprobs:
        return
    columns = (host[name].tolist() for name in ("own", "own_rank", "top", "top_ids"))
    for number, own, rank, values, ids in zip(recipe.logprobs, *columns, strict=True):
        width = min(recipe.rows[number].params.logprobs or 0, len(ids))
        entry = {ids[place]: Logprob(values[place], place + 1) for place in range(width)}
        entry.setdefault(tokens[number], Logprob(own, rank))
        yield number, entry
