"""What one step has to compute and to move, counted from the model's dimensions; and the roofline over it.

    step_cost(model, [ChunkShape(count=512, past=0), ChunkShape(count=1, past=900), …]) -> StepCost
    Roof(bandwidth, peak).seconds(cost)     # max(bytes / bandwidth, FLOPs / peak)

Pure arithmetic: no torch, no clock. The roofline is Williams, Waterman and Patterson's (CACM 52(4), 2009). It
is a lower bound on a step's time: it knows nothing of launches, of caches, or of kernels that are not perfect.
A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, repr=False)
class ChunkShape:
    """One sequence's part of a step: `count` new tokens behind `past` tokens whose KV is in the cache.

    A decode step is `(1, past)`, a whole prompt `(length, 0)`. `samples` is 1 if a token is drawn behind the
    last one, which takes the vocabulary projection of that row; 0 in the middle of a prompt.
    """

    count: int
    past: int = 0
    samples: int = 1

    @property
    def pairs(self) -> int:
        """(query, key) pairs that causal attention looks at: new token i sees the past and i + 1 new ones."""
        return self.count * self.past + self.count * (self.count + 1) // 2

    def __repr__(self) -> str:
        tail = "" if self.samples == 1 else f", samples={self.samples}"
        return f"ChunkShape({self.count}, past={self.past}{tail})"


@dataclass(frozen=True, repr=False)
class ModelDims:
    """Dimensions of a decoder with grouped-query attention and a gated MLP (Llama, Qwen2, Qwen3, Mistral).

    `weight_itemsize` and `kv_itemsize` are bytes a number. Norms and biases are left out: under 0.1 % of the
    weights. With tied embeddings the vocabulary projection is the embedding table.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool
    weight_itemsize: int
    kv_itemsize: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("name", "tied_embeddings") and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; a dimension is an integer of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")

    def __repr__(self) -> str:
        return f"<{self.name}: {self.num_layers} layers of {self.hidden_size}>"

    @classmethod
    def from_config(
        cls, config: Any, *, name: str = "", weight_itemsize: int, kv_itemsize: int | None = None
    ) -> ModelDims:
        """From a Hugging Face configuration of a supported architecture; KV is as wide as weights if not said."""
        return cls(
            name=name or config.model_type,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab_size=config.vocab_size,
            tied_embeddings=bool(config.tie_word_embeddings),
            weight_itemsize=weight_itemsize,
            kv_itemsize=kv_itemsize or weight_itemsize,
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer: q and o, k and v, gate, up and down."""
        attention = 2 * self.num_heads * self.head_dim + 2 * self.num_kv_heads * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def token_weights(self) -> int:
        """Numbers in the matrices that every token is multiplied with: those of all layers."""
        return self.num_layers * self.layer_weights

    @property
    def vocab_weights(self) -> int:
        """Numbers in the vocabulary projection; only rows that draw a token are multiplied with it."""
        return self.vocab_size * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory."""
        tables = self.vocab_weights * (1 if self.tied_embeddings else 2)
        return (self.token_weights + tables) * self.weight_itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers (147,456 for Qwen3-8B in 16 bits)."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_itemsize

    def activation_bytes(self, tokens: int, drawn: int) -> int:
        """Bytes that go into and come out of the matrix products of a step, once each.

        `drawn` of the `tokens` get logits. Products that read the same input count it once. What a cache
        holds back never reaches memory, so this is an upper bound.
        """
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size + 2 * queries + 2 * keys  # q, k and v; o
        mlp = 2 * self.hidden_size + 3 * self.intermediate_size  # gate and up; down
        numbers = tokens * (
            self.hidden_size + self.num_layers * (attention + mlp)
        )  # first the embedding's row
        return (numbers + drawn * (self.hidden_size + self.vocab_size)) * self.weight_itemsize


@dataclass(frozen=True)
class StepCost:
    """What one step computes and moves. Kinds are kept apart: a cost model weighs each with its own rate."""

    tokens: int
    gemm_flops: int
    attention_flops: int
    weight_bytes: int
    kv_read_bytes: int
    kv_write_bytes: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        return self.gemm_flops + self.attention_flops

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """FLOPs for each byte moved."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Roof:
    """A machine's two ceilings for one data type, measured or from a data sheet; `name` says which machine."""

    bandwidth_bytes_per_s: float
    peak_flops_per_s: float
    name: str = ""

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on computing, not memory, is the limit."""
        return self.peak_flops_per_s / self.bandwidth_bytes_per_s

    def flops_per_s(self, intensity: float) -> float:
        """The most that work of this intensity can reach."""
        return min(self.peak_flops_per_s, intensity * self.bandwidth_bytes_per_s)

    def raised(self, other: Roof) -> Roof:
        """The higher of each ceiling: of two measurements of one machine, the less disturbed."""
        return Roof(
            max(self.bandwidth_bytes_per_s, other.bandwidth_bytes_per_s),
            max(self.peak_flops_per_s, other.peak_flops_per_s),
            self.name,
        )

    def seconds(self, cost: StepCost) -> float:
        """The least time that the step can take."""
        return max(cost.bytes / self.bandwidth_bytes_per_s, cost.flops / self.peak_flops_per_s)


def step_flops(model: ModelDims, chunks: Seq[ChunkShape]) -> int:
    """FLOPs of one step: matrix products, and attention over the pairs that the causal mask leaves."""
    return gemm_flops(model, chunks) + attention_flops(model, chunks)


def gemm_flops(model: ModelDims, chunks: Seq[ChunkShape]) -> int:
    """FLOPs of the matrix products: each token with all layers, each row that draws one with the vocabulary."""
    tokens = sum(chunk.count for chunk in chunks)
    drawn = sum(chunk.samples > 0 for chunk in chunks)
    return 2 * tokens * model.token_weights + 2 * drawn * model.vocab_weights


def attention_flops(model: ModelDims, chunks: Seq[ChunkShape]) -> int:
    """FLOPs of attention: what is behind the causal mask is not counted."""
    pairs = sum(chunk.pairs for chunk in chunks)
    # For each pair and query head a dot product with K, and as much again to add up V.
    return pairs * model.num_layers * model.num_heads * 2 * (2 * model.head_dim)


def step_cost(model: ModelDims, chunks: Seq[ChunkShape]) -> StepCost:
    """Totals of a step that computes `chunks`, one for each sequence.

    Weights are read once for all of them, the vocabulary projection only if somebody draws a token, and of an
    embedding table of its own only the rows looked up. Each sequence's K and V are read once up to its last
    token, and its new tokens' written.

    Raises:
        ValueError: no chunk, or one without tokens.
    """
    if not chunks or any(chunk.count < 1 or chunk.past < 0 for chunk in chunks):
        raise ValueError(f"a step is one chunk or more, each of at least one token; got {list(chunks)}")
    tokens = sum(chunk.count for chunk in chunks)
    context = sum(chunk.past + chunk.count for chunk in chunks)
    drawn = sum(chunk.samples > 0 for chunk in chunks)
    weights = model.token_weights + (model.vocab_weights if drawn else 0)
    return StepCost(
        tokens=tokens,
        gemm_flops=gemm_flops(model, chunks),
        attention_flops=attention_flops(model, chunks),
        weight_bytes=weights * model.weight_itemsize,
        kv_read_bytes=context * model.kv_bytes_per_token,
        kv_write_bytes=tokens * model.kv_bytes_per_token,
        activation_bytes=model.activation_bytes(tokens, drawn),
    )


def arithmetic_intensity(model: ModelDims, chunks: Seq[ChunkShape]) -> float:
    """FLOPs per byte of one step."""
    return step_cost(model, chunks).intensity


def time_per_output_token(model: ModelDims, contexts: Seq[int], roof: Roof) -> float:
    """Seconds between two tokens of each running sequence, at best: the roofline time of a decode step.

    Args:
        contexts: for each running sequence, the tokens whose KV is in the cache before the step
    """
    return roof.seconds(step_cost(model, [ChunkShape(1, past) for past in contexts]))
