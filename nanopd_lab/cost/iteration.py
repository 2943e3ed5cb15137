"""How long one engine step takes: a sum of few terms, each with a physical meaning.

    device = t0 + smooth_max(weights, products) + a1·Σ q(k + q/2) + a2·Σ context + a3·sequences
    step   = max(host, device)

A step computes for each sequence a chunk of q new tokens behind k past ones. `weights` is the time to read the
matrices once, `products` that of the matrix products of all tokens: the larger of the two counts, with a round corner.
Launch overhead is the host's own time. It runs beside the device's, so it is a floor and not a summand: CUDA graphs
lower `host_s`, and pad a step to one of the captured sizes, which `products` sees. On a GPU three more terms are small:
a pair of a chunk below SHORT_CHUNK tokens takes a little longer, as another kernel computes it; so does that chunk's
past where it is not alone in its step, as the kernel cuts the keys of all sequences into parts of one length; and so
does a step with prompt chunks, whose logits are not in the graph. On a CPU a matrix times one vector runs at the
memory's speed, times a few it need not: that is a constant more.

Seconds everywhere. Pure arithmetic without torch, a clock or a lookup, as a simulator asks 100,000 times a second;
runs of decode steps of an unchanged batch have closed forms.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nanopd_lab.cost.roofline import ChunkShape, ModelDims

MOST_STEPS = 1e12  # far below what a float counts in ones
SHORT_CHUNK = 512  # tokens: below, a chunk goes through the paged kernel (`attention.cuda.LONG_QUERY`)


def smooth_max(a: float, b: float, sharpness: float) -> float:
    """`(a^p + b^p)^(1/p)`: the sum at p = 1, the maximum as p grows; a and b not negative."""
    low, high = (a, b) if a < b else (b, a)
    if low <= 0.0:
        return high
    return high * (1.0 + (low / high) ** sharpness) ** (1.0 / sharpness)


@dataclass(slots=True, unsafe_hash=True)
class StepFeatures:
    """What the model needs to know of a step. Frozen in spirit only, which makes it much cheaper to make.

    tokens:    new ones, all sequences together: Σ q
    drawn:     sequences that draw a token, and so need a row of the vocabulary projection
    pairs:     Σ q(k + q/2), the (query, key) pairs of causal attention without the half on the diagonal
    context:   Σ (k + q), tokens whose K and V are read
    sequences: number of chunks
    short_pairs: those of `pairs` that belong to prompt chunks below SHORT_CHUNK tokens; for GPUs
    shared_context: what of `context` belongs to such chunks that are not alone in their step; for GPUs
    """

    tokens: int
    drawn: int
    pairs: float
    context: int
    sequences: int
    short_pairs: float = field(default=0.0, compare=False)
    shared_context: int = field(default=0, compare=False)

    @classmethod
    def of(cls, chunks: Iterable[ChunkShape]) -> StepFeatures:
        """Of the chunks of one step.

        Raises:
            ValueError: no chunk, or one without tokens or with a negative past.
        """
        tokens = drawn = context = sequences = short_context = 0
        pairs = short_pairs = 0.0
        for chunk in chunks:
            if chunk.count < 1 or chunk.past < 0:
                raise ValueError(f"{chunk} has no tokens or a negative past")
            tokens += chunk.count
            drawn += chunk.samples > 0
            of_chunk = chunk.count * (chunk.past + chunk.count / 2)
            pairs += of_chunk
            if 1 < chunk.count < SHORT_CHUNK:
                short_pairs += of_chunk
                short_context += chunk.past + chunk.count
            context += chunk.past + chunk.count
            sequences += 1
        if not sequences:
            raise ValueError("a step is one chunk or more; got none")
        shared_context = short_context if sequences > 1 else 0
        return cls(tokens, drawn, pairs, context, sequences, short_pairs, shared_context)

    @property
    def decodes_only(self) -> bool:
        """True if no chunk has more than one token."""
        return self.tokens == self.sequences


@dataclass(frozen=True)
class CapturedSizes:
    """What steps are padded to by CUDA graphs, which hold so many rows whatever a step has.

    batches: sequences of the captured decode steps; tokens: of the other captured steps; both ascending, () for none

    Raises:
        ValueError: sizes that are not ascending or not positive.
    """

    batches: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, sizes in (("batches", self.batches), ("tokens", self.tokens)):
            if any(b <= a for a, b in zip((0, *sizes), sizes, strict=False)):
                raise ValueError(f"{name} are {sizes}; sizes are positive and ascending")

    def rows(self, tokens: int, drawn: int, sequences: int) -> tuple[int, int]:
        """(tokens that are multiplied with the weights, rows of the vocabulary projection) of such a step."""
        if tokens == sequences and self.batches and tokens <= self.batches[-1]:
            rows = self.batches[bisect_left(self.batches, tokens)]
            return rows, rows  # the projection is in the graph
        if self.tokens and tokens <= self.tokens[-1]:
            return self.tokens[bisect_left(self.tokens, tokens)], drawn
        return tokens, drawn


@dataclass(frozen=True)
class IterationModel:
    """One model on one device.

    t0_s:        of every step, on the device
    weight_s:    to read the weights that every token is multiplied with
    token_s:     of one token's matrix products, where they are the limit
    pair_s:      a1, of attention, each (query, key) pair
    context_s:   a2, to read K and V of one token
    sequence_s:  a3, each sequence
    host_s:      of the host, each step: launch overhead
    vocab_share: the vocabulary projection's weights as a part of those in `weight_s`. They are read if anybody draws
                 a token, and each sequence that does adds so much of a token's products.
    sharpness:   of the corner where products overtake reading; see `smooth_max`
    short_pair_s: what a pair of a short prompt chunk takes longer; see `short_pairs`
    shared_context_s: what reading K and V of one token takes longer for those of `shared_context`
    mixed_s:     of a step with a prompt chunk, beside all else: its logits are behind the graph and not in it
    rows_s:      what several tokens at once take longer than one, beside all else: of the vocabulary projection too, by
                 its share, where several are drawn
    captured:    what CUDA graphs pad steps to

    Raises:
        ValueError: a coefficient that is negative or not finite, or a sharpness below 1.
    """

    t0_s: float
    weight_s: float
    token_s: float
    pair_s: float
    context_s: float
    sequence_s: float
    host_s: float = 0.0
    vocab_share: float = 0.0
    sharpness: float = 4.0
    short_pair_s: float = 0.0
    mixed_s: float = 0.0
    rows_s: float = 0.0
    shared_context_s: float = 0.0
    captured: CapturedSizes = CapturedSizes()
    # What decode steps of so many sequences take without their context, as far as somebody has asked.
    _of_batch: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            value: float = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; a coefficient is finite and not negative")
        if self.sharpness < 1:
            raise ValueError(f"sharpness is {self.sharpness}; it is at least 1 (weights and products add up)")

    @classmethod
    def from_roofline(
        cls,
        dims: ModelDims,
        bandwidth_bytes_per_s: float,
        peak_flops_per_s: float,
        launch_overhead_s: float = 0.0,
    ) -> IterationModel:
        """A prior for a device that nobody has profiled: every byte at `bandwidth`, every FLOP at `peak`.

        Raises:
            ValueError: a bandwidth or a peak that is not positive.
        """
        if not (bandwidth_bytes_per_s > 0 and peak_flops_per_s > 0):
            raise ValueError(
                f"bandwidth {bandwidth_bytes_per_s} B/s and peak {peak_flops_per_s} FLOP/s must be positive"
            )
        return cls(
            t0_s=0.0,
            weight_s=dims.token_weights * dims.weight_itemsize / bandwidth_bytes_per_s,
            token_s=2 * dims.token_weights / peak_flops_per_s,
            pair_s=4 * dims.num_layers * dims.num_heads * dims.head_dim / peak_flops_per_s,
            context_s=dims.kv_bytes_per_token / bandwidth_bytes_per_s,
            sequence_s=0.0,
            host_s=launch_overhead_s,
            vocab_share=dims.vocab_weights / dims.token_weights,
        )

    def scaled(self, factor: float) -> IterationModel:
        """Of a device on which every step takes `factor` times as long."""
        seconds: dict[str, Any] = {
            name: factor * getattr(self, name) for name in COEFFICIENTS if name.endswith("_s")
        }
        return replace(self, **seconds)

    # ---- any step --------------------------------------------------------------------------------------

    def seconds(self, chunks: Iterable[ChunkShape]) -> float:
        """Of a step that computes these chunks.

        Raises:
            ValueError: see `StepFeatures.of`.
        """
        return self.of_features(StepFeatures.of(chunks))

    def of_features(self, step: StepFeatures) -> float:
        """Of a step that is known by its totals."""
        return max(self.host_s, self.device_seconds(step))

    def device_seconds(self, step: StepFeatures) -> float:
        """Of the device alone, as if the host took no time."""
        tokens, drawn = self.captured.rows(step.tokens, step.drawn, step.sequences)
        return (
            self.t0_s
            + (0.0 if step.decodes_only else self.mixed_s)
            + self._matrices(tokens, drawn)
            + self.pair_s * step.pairs
            + self.short_pair_s * step.short_pairs
            + self.shared_context_s * step.shared_context
            + self.context_s * step.context
            + self.sequence_s * step.sequences
        )

    def _matrices(self, tokens: int, drawn: int) -> float:
        weights = self.weight_s * (1.0 + self.vocab_share) if drawn else self.weight_s
        seconds = smooth_max(weights, self.token_s * (tokens + self.vocab_share * drawn), self.sharpness)
        if not self.rows_s:
            return seconds
        return seconds + self.rows_s * ((tokens > 1) + self.vocab_share * (drawn > 1))

    # ---- decode steps ----------------------------------------------------------------------------------

    def decode_seconds(self, batch: int, total_context: int) -> float:
        """Of one decode step of `batch` sequences with `total_context` tokens in the cache before it, all together."""
        first, _ = self._decode_line(batch, total_context)
        return max(self.host_s, first)

    def decode_run_seconds(self, batch: int, total_context: int, steps: int) -> float:
        """Of so many decode steps of the same batch, each of which adds a token to every sequence.

        The device's times are an arithmetic series; those of its first terms that the host exceeds count as the host's.
        """
        return self.decode_run(batch, total_context)(steps)

    def decode_run(self, batch: int, total_context: int) -> Callable[[int], float]:
        """`decode_run_seconds` of one batch, for who asks for several numbers of steps."""
        first, growth = self._decode_line(batch, total_context)
        if first >= self.host_s:
            return lambda steps: steps * first + growth * (steps * (steps - 1) / 2)
        host_s, host_steps = self.host_s, self._host_steps

        def seconds(steps: int) -> float:
            floor = host_steps(first, growth, steps)
            rest = steps - floor
            return host_s * floor + rest * first + growth * (floor * rest + rest * (rest - 1) / 2)

        return seconds

    def decode_steps_within(self, batch: int, total_context: int, seconds: float) -> int:
        """How many whole decode steps of the same batch fit into `seconds`: the inverse of `decode_run_seconds`.

        Raises:
            ValueError: steps take no time by this model, or none that counts beside `seconds`.
        """
        first, growth = self._decode_line(batch, total_context)
        if max(self.host_s, first) <= seconds / MOST_STEPS or max(self.host_s, first) <= 0:
            raise ValueError(
                f"decode steps take no time beside {seconds} s by this model; any number of them fits"
            )
        # Where the host is the limit, steps are alike; behind that, solve n·d + growth·n(n-1)/2 = left for n.
        floor = self._host_steps(first, growth, None)
        alike = seconds / self.host_s if self.host_s > 0 else math.inf
        if alike < floor:
            guess = alike
        else:
            left, start = seconds - self.host_s * floor, first + growth * floor
            guess = floor + _series_terms(start, growth, left)
        # The solution is a float: put right what rounding may have moved by one.
        steps = max(0, int(guess))
        while steps > 0 and self.decode_run_seconds(batch, total_context, steps) > seconds:
            steps -= 1
        while self.decode_run_seconds(batch, total_context, steps + 1) <= seconds:
            steps += 1
        return steps

    def _decode_line(self, batch: int, total_context: int) -> tuple[float, float]:
        """(the device's time of the first step, what each further one takes longer)."""
        slope = self.pair_s + self.context_s
        if (constant := self._of_batch.get(batch)) is None:
            each = self.pair_s / 2 + self.context_s + self.sequence_s
            constant = self.t0_s + self._matrices(*self.captured.rows(batch, batch, batch)) + batch * each
            self._of_batch[batch] = constant
        return constant + slope * total_context, slope * batch

    def _host_steps(self, first: float, growth: float, most: int | None) -> float | int:
        """Steps at the beginning of a decode run for which the host takes longer; `most` of them, if given."""
        if first >= self.host_s:
            return 0
        limit = math.inf if most is None else most
        until = (self.host_s - first) / growth if growth > 0 else math.inf
        return limit if until >= limit else math.ceil(until)


COEFFICIENTS = tuple(each.name for each in fields(IterationModel) if each.init and each.name != "captured")
"""The fields of an `IterationModel` that are numbers."""


def _series_terms(first: float, growth: float, total: float) -> float:
    """n, not rounded, with first + (first + growth) + … = total over n terms."""
    if total <= 0:
        return 0.0
    b = first - growth / 2
    # The root in the form that doesn't cancel as the growth goes to 0.
    return 2 * total / (b + math.sqrt(b * b + 2 * growth * total))
