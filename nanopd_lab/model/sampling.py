"""From logits to tokens, vectorised over the batch.

Every row draws one uniform number from a counter-based generator, a pure function of (seed, sample, position),
and inverts the cumulative distribution in vocabulary order. So a request's tokens do not depend on which
other requests share its batch, on how often it was preempted, or on the device.

top_k and top_p are turned into one threshold a row: a token is kept if its logit reaches it (ties stay in, as
in Hugging Face's top-k filter), which makes the kept set independent of how a sort breaks ties.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanopd_lab.core import Logprob, SampledToken, SamplingParams
from nanopd_lab.model.batch import to_device

# top_p first looks at this many of the most likely tokens and sorts the whole vocabulary only if their
# probability does not reach top_p.
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


def _mix(x: int) -> int:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014): 64 well-mixed bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return (_mix(_mix(_mix(seed & _MASK) ^ sample) ^ position) >> 11) * 2.0**-53


def request_seed(engine_seed: int, serial: int) -> int:
    """The seed of a request that brought none: differs between requests, repeats with the engine's seed."""
    return _mix(_mix(engine_seed & _MASK) ^ (serial + 1))


@dataclass(frozen=True)
class Drawn:
    """Tokens that have been drawn, on the device; on a GPU they may still be on their way.

    tokens: int64 `[R]` on the device, for the next step's input; -1 where the logits are not finite
    """

    tokens: torch.Tensor
    rows: Seq[SamplingRow]
    _host: dict[str, torch.Tensor]
    _arrived: torch.cuda.Event | None

    def result(self) -> list[SampledToken]:
        """One for each row. Waits for the device; a row whose logits are not finite has `error` set."""
        if self._arrived is not None:
            self._arrived.synchronize()
        entries = _entries(self._host, self.rows)
        out = []
        for token, entry in zip(self._host["tokens"].tolist(), entries, strict=True):
            if token < 0:
                out.append(SampledToken(-1, error="the model returned non-finite logits (NaN or infinity)"))
            elif entry is None:
                out.append(SampledToken(token))
            else:
                out.append(SampledToken(token, entry[token].logprob, entry))
        return out


def sample(logits: torch.Tensor, rows: Seq[SamplingRow]) -> list[SampledToken]:
    """`draw(...).result()`: draws one token for each row, and waits for them."""
    return draw(logits, rows).result()


def draw(logits: torch.Tensor, rows: Seq[SamplingRow]) -> Drawn:
    """Draw one token for each row without waiting for the device.

    (Except that `top_p` must look whether its shortlist was long enough.)

    Args:
        logits: `[R, vocab]`, any float type; several rows may refer to the same logits
        rows: what to draw
    """
    order = [row.logits_row for row in rows]
    if order != list(range(logits.shape[0])):
        logits = logits.index_select(0, to_device(order, torch.int64, logits.device))
    raw = logits
    if any(row.banned for row in rows):
        logits = logits.clone()
        for number, row in enumerate(rows):
            logits[number, list(row.banned)] = float("-inf")

    # One pass for all that is greedy: a maximum shows NaN and +infinity too.
    largest, tokens = logits.max(-1)
    finite = torch.isfinite(largest)
    drawn = [number for number, row in enumerate(rows) if not row.params.greedy]
    if len(drawn) == len(rows) and rows:
        tokens = _draw(logits.float(), rows)
    elif drawn:
        index = to_device(drawn, torch.int64, logits.device)
        tokens = tokens.index_copy(0, index, _draw(logits[index].float(), [rows[number] for number in drawn]))
    tokens = tokens.masked_fill(~finite, -1)

    found = {"tokens": tokens, **_logprobs(raw, tokens, rows)}
    if logits.device.type != "cuda":
        return Drawn(tokens, rows, found, None)
    host = {name: _to_pinned(tensor) for name, tensor in found.items()}
    arrived = torch.cuda.Event()
    arrived.record()
    return Drawn(tokens, rows, host, arrived)


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _draw(logits: torch.Tensor, rows: Seq[SamplingRow]) -> torch.Tensor:
    """`[R]` tokens drawn from `[R, vocab]` float32 logits of rows that are not greedy."""
    device = logits.device
    params = [row.params for row in rows]
    points = [uniform(row.seed, row.sample, row.position) for row in rows]
    numbers = [(max(p.temperature, 1e-6), p.min_p, point) for p, point in zip(params, points, strict=True)]
    columns = to_device(numbers, torch.float64, device)
    temperature, min_p, point = columns[:, 0:1].float(), columns[:, 1:2].float(), columns[:, 2:3]

    # A tiny temperature must not overflow: subtract the maximum first.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    if any(p.min_p > 0 for p in params):
        # p >= min_p * p_max, in logits; the maximum is 0.
        scaled = scaled.masked_fill(scaled < min_p.log(), float("-inf"))
    filtered = [i for i, p in enumerate(params) if 0 < p.top_k < logits.shape[1] or p.top_p < 1.0]
    if filtered:
        index = to_device(filtered, torch.int64, device)
        found = _thresholds(scaled[index], [params[i] for i in filtered])
        threshold = torch.full((len(rows), 1), float("-inf"), device=device).index_copy(0, index, found)
        scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
    cumulative = scaled.exp().double().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(point * total, torch.nextafter(total, torch.zeros_like(total)))
    # NaN logits have no distribution; the row is an error already, and any index in range will do.
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[1] - 1)


def _thresholds(scaled: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """`[R, 1]`: the smallest logit that top_k and then top_p keep."""
    vocab = scaled.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    top_p = to_device([[p.top_p] for p in params], torch.float64, scaled.device)
    limit = to_device([[k] for k in top_k], torch.int64, scaled.device)
    width = max([k for k in top_k if k < vocab], default=1)
    if any(p.top_p < 1.0 and k == vocab for p, k in zip(params, top_k, strict=True)):
        width = max(width, min(TOP_P_SHORTLIST, vocab))
    while True:
        values = scaled.topk(width, dim=-1).values  # descending
        rank = torch.arange(width, device=scaled.device)
        weight = values.exp().double().masked_fill(rank >= limit, 0.0)
        whole = scaled.exp().double().sum(-1, keepdim=True)
        total = torch.where(limit < vocab, weight.sum(-1, keepdim=True), whole)
        reached = weight.cumsum(-1) >= top_p * total
        unfinished = (top_p < 1.0) & ~reached.any(-1, keepdim=True) & (limit > width)
        if width == vocab or not bool(unfinished.any()):
            break
        width = vocab
    last = torch.where(reached.any(-1), reached.int().argmax(-1), width - 1)[:, None]
    last = torch.where(top_p < 1.0, last, width - 1).minimum(limit - 1)
    keep_all = (top_p >= 1.0) & (limit >= vocab)
    return values.gather(-1, last.clamp(max=width - 1)).masked_fill(keep_all, float("-inf"))


def _logprobs(raw: torch.Tensor, tokens: torch.Tensor, rows: Seq[SamplingRow]) -> dict[str, torch.Tensor]:
    """Log-probabilities of the raw distribution for the rows that asked: the top ones and the token drawn.

    `own` and `own_rank` `[W]`, `top` and `top_ids` `[W, width]`, for the W rows with `logprobs`; else nothing.
    """
    wanted = [number for number, row in enumerate(rows) if row.params.logprobs is not None]
    if not wanted:
        return {}
    index = to_device(wanted, torch.int64, raw.device)
    logprobs = raw.index_select(0, index).float().log_softmax(-1)
    own = logprobs.gather(-1, tokens.index_select(0, index).clamp(min=0)[:, None])
    width = min(max(rows[number].params.logprobs or 0 for number in wanted), logprobs.shape[1])
    top = logprobs.topk(max(width, 1), dim=-1)
    rank = (logprobs > own).sum(-1) + 1
    return {"own": own.squeeze(-1), "own_rank": rank, "top": top.values, "top_ids": top.indices}


def _entries(host: dict[str, torch.Tensor], rows: Seq[SamplingRow]) -> list[dict[int, Logprob] | None]:
    """The log-probabilities of `_logprobs` as each request asked for them."""
    out: list[dict[int, Logprob] | None] = [None] * len(rows)
    if "own" not in host:
        return out
    wanted = [number for number, row in enumerate(rows) if row.params.logprobs is not None]
    tokens = host["tokens"].tolist()
    columns = (host[name].tolist() for name in ("own", "own_rank", "top", "top_ids"))
    for number, own, rank, values, ids in zip(wanted, *columns, strict=True):
        width = min(rows[number].params.logprobs or 0, len(ids))
        entry = {ids[place]: Logprob(values[place], place + 1) for place in range(width)}
        entry.setdefault(tokens[number], Logprob(own, rank))
        out[number] = entry
    return out
