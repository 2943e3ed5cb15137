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

import torch

from nanopd_lab.core import Logprob, SampledToken, SamplingParams

# top_p first looks at this many of the most likely tokens and sorts the whole vocabulary only if their
# probability does not reach top_p.
TOP_P_SHORTLIST = 1024
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRow:
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


def sample(logits: torch.Tensor, rows: Seq[SamplingRow]) -> list[SampledToken]:
    """Draw one token for each row.

    Args:
        logits: `[R, vocab]`, any float type; several rows may refer to the same logits
        rows: what to draw

    Returns:
        A token a row; a row whose logits are not finite has `error` set instead.
    """
    index = torch.tensor([row.logits_row for row in rows], device=logits.device)
    if len(rows) != logits.shape[0] or index.tolist() != list(range(len(rows))):
        logits = logits.index_select(0, index)
    logits = logits.float()
    finite = torch.isfinite(logits.sum(-1))  # NaN and infinities survive a sum
    raw = logits
    if any(row.banned for row in rows):
        logits = logits.clone()
        for number, row in enumerate(rows):
            logits[number, list(row.banned)] = float("-inf")

    tokens = logits.argmax(-1)
    drawn = [number for number, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        chosen = _draw(
            logits if len(drawn) == len(rows) else logits[drawn], [rows[number] for number in drawn]
        )
        tokens[drawn] = chosen

    entries = _logprobs(raw, tokens, rows)
    results = []
    for token, ok, entry in zip(tokens.tolist(), finite.tolist(), entries, strict=True):
        if not ok:
            results.append(SampledToken(-1, error="the model returned non-finite logits (NaN or infinity)"))
        elif entry is None:
            results.append(SampledToken(token))
        else:
            results.append(SampledToken(token, entry[token].logprob, entry))
    return results


def _draw(logits: torch.Tensor, rows: Seq[SamplingRow]) -> torch.Tensor:
    """`[R]` tokens drawn from `[R, vocab]` float32 logits of rows that are not greedy."""
    device = logits.device
    params = [row.params for row in rows]

    def column(values: Seq[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    # A tiny temperature must not overflow: subtract the maximum first.
    scaled = (logits - logits.amax(-1, keepdim=True)) / column([max(p.temperature, 1e-6) for p in params])
    if any(p.min_p > 0 for p in params):
        # p >= min_p * p_max, in logits; the maximum is 0.
        floor = column([p.min_p for p in params]).log()
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    filtered = [i for i, p in enumerate(params) if 0 < p.top_k < logits.shape[1] or p.top_p < 1.0]
    if filtered:
        threshold = torch.full((len(rows), 1), float("-inf"), device=device)
        threshold[filtered] = _thresholds(scaled[filtered], [params[i] for i in filtered])
        scaled = scaled.masked_fill(scaled < threshold, float("-inf"))
    cumulative = scaled.exp().double().cumsum(-1)
    total = cumulative[:, -1:]
    point = torch.tensor([[uniform(row.seed, row.sample, row.position)] for row in rows], dtype=torch.float64)
    target = torch.minimum(point.to(device) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _thresholds(scaled: torch.Tensor, params: Seq[SamplingParams]) -> torch.Tensor:
    """`[R, 1]`: the smallest logit that top_k and then top_p keep."""
    vocab = scaled.shape[1]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    top_p = torch.tensor([[p.top_p] for p in params], dtype=torch.float64, device=scaled.device)
    width = max([k for k in top_k if k < vocab], default=1)
    if any(p.top_p < 1.0 and k == vocab for p, k in zip(params, top_k, strict=True)):
        width = max(width, min(TOP_P_SHORTLIST, vocab))
    while True:
        values = scaled.topk(width, dim=-1).values  # descending
        rank = torch.arange(width, device=scaled.device)
        limit = torch.tensor(top_k, device=scaled.device)[:, None]
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


def _logprobs(
    raw: torch.Tensor, tokens: torch.Tensor, rows: Seq[SamplingRow]
) -> list[dict[int, Logprob] | None]:
    """Log-probabilities of the raw distribution for the rows that asked: the top ones and the token drawn."""
    wanted = [number for number, row in enumerate(rows) if row.params.logprobs is not None]
    out: list[dict[int, Logprob] | None] = [None] * len(rows)
    if not wanted:
        return out
    logprobs = raw[wanted].log_softmax(-1)
    own = tokens[wanted][:, None]
    own_value = logprobs.gather(-1, own)
    own_rank = (logprobs > own_value).sum(-1) + 1
    width = min(max(rows[number].params.logprobs or 0 for number in wanted), logprobs.shape[1])
    top = logprobs.topk(max(width, 1), dim=-1)
    columns = zip(
        wanted,
        own.squeeze(-1).tolist(),
        own_value.squeeze(-1).tolist(),
        own_rank.tolist(),
        top.values.tolist(),
        top.indices.tolist(),
        strict=True,
    )
    for number, token, value, rank, values, indices in columns:
        entry = {}
        for place in range(min(rows[number].params.logprobs or 0, width)):
            entry[indices[place]] = Logprob(values[place], place + 1)
        entry.setdefault(token, Logprob(value, rank))
        out[number] = entry
    return out
