"""Exercises on what a step costs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

from nanopd_lab.cost.roofline import (
    ChunkShape,
    ModelDims,
    Roof,
    arithmetic_intensity,
    step_cost,
    time_per_output_token,
)
from nanopd_lab.lab.checking import call, expect
from nanopd_lab.lab.registry import Exercise

# Small enough to be worked by hand; then with everything different that can be; then real ones.
TOY = ModelDims("toy", 2, 4, 8, 2, 1, 2, 10, True, 4, 4)
ODD = ModelDims("odd", 3, 12, 20, 6, 2, 5, 30, False, 2, 1)
SMOLLM2 = ModelDims("smollm2", 30, 576, 1536, 9, 3, 64, 49_152, True, 4, 4)
QWEN3_8B = ModelDims("qwen3-8b", 36, 4096, 12_288, 32, 8, 128, 151_936, False, 2, 2)
MODELS = (TOY, ODD, SMOLLM2, QWEN3_8B)


def check_arithmetic_intensity(impl: Callable[[ModelDims, Sequence[ChunkShape]], float]) -> int:
    """One sequence, then several, then prompts and chunks that draw no token, then random mixtures."""
    count = 0
    for model, chunks in _steps():
        count += 1
        got = call(impl, model=model, chunks=chunks)
        want = arithmetic_intensity(model, chunks)
        cost = step_cost(model, chunks)
        expect(_is_number(got), "FLOPs per byte is a number", want)
        parts = (
            f"{cost.flops:,} FLOPs over {cost.weight_bytes:,} (weights) + {cost.kv_read_bytes:,} (KV read) "
            f"+ {cost.kv_write_bytes:,} (KV written) + {cost.activation_bytes:,} (activations) bytes"
        )
        guess = _guess_bytes(model, chunks, float(got))
        expect(_close(got, want), f"{guess}{parts}", want)
    return count


def _steps() -> Iterator[tuple[ModelDims, list[ChunkShape]]]:
    for model in (TOY, ODD):
        yield model, [ChunkShape(1, 3)]
        yield model, [ChunkShape(1, 0)]
        yield model, [ChunkShape(1, 3), ChunkShape(1, 8)]
        yield model, [ChunkShape(5)]
        yield model, [ChunkShape(5, samples=0)]
        yield model, [ChunkShape(4, 6), ChunkShape(1, 9)]
        yield model, [ChunkShape(4, 6, samples=0), ChunkShape(1, 9)]
    for model, past in itertools.product((SMOLLM2, QWEN3_8B), (0, 1, 100, 4000)):
        for batch in (1, 2, 64):
            yield model, [ChunkShape(1, past)] * batch
        for length in (2, 17, 512, 5000):
            yield model, [ChunkShape(length, past)]
            yield model, [ChunkShape(length, past, samples=0)]
    rng = random.Random(0)
    for _ in range(60):
        chunks = [
            ChunkShape(rng.choice((1, 1, rng.randint(2, 300))), rng.randint(0, 900), rng.randint(0, 1))
            for _ in range(rng.randint(1, 4))
        ]
        yield rng.choice(MODELS), chunks


def _guess_bytes(model: ModelDims, chunks: Sequence[ChunkShape], got: float) -> str:
    """Which of the usual mistakes gives exactly that, in words; else nothing."""
    cost = step_cost(model, chunks)
    total, weights, kv = cost.bytes, cost.weight_bytes, model.kv_bytes_per_token
    table = model.vocab_weights * model.weight_itemsize
    drawn = any(chunk.samples for chunk in chunks)
    new = "a new token's KV counts twice, written and read: "
    once = "the weights are read once for the whole step: "
    mistakes = [
        ("that is bytes over FLOPs: ", cost.flops**2 / total),
        (once, total + (cost.tokens - 1) * weights),
        (once, total + (len(chunks) - 1) * weights),
        ("a drawn token takes the vocabulary projection: ", total - table if drawn else 0),
        ("nobody draws a token, so no vocabulary projection: ", total if drawn else total + table),
        (
            "only a row a token is read of that embedding table: ",
            0 if model.tied_embeddings else total + table,
        ),
        ("the KV of the past is missing: ", total - cost.kv_read_bytes + cost.tokens * kv),
        ("the KV read is missing: ", total - cost.kv_read_bytes),
        (new, total - cost.kv_write_bytes),
        ("every sequence reads its own KV: ", total - sum(c.past + c.count for c in chunks[1:]) * kv),
        ("the KV is missing: ", total - cost.kv_read_bytes - cost.kv_write_bytes),
        (
            "KV is read once a sequence: ",
            total - cost.kv_read_bytes + sum(chunk.pairs for chunk in chunks) * kv,
        ),
        ("the activations are missing: ", total - cost.activation_bytes),
        ("attention's FLOPs are missing: ", cost.flops * total / cost.gemm_flops),
        (
            "KV is kept for KV heads, not for query heads: ",
            total + (cost.kv_read_bytes + cost.kv_write_bytes) * (model.num_heads // model.num_kv_heads - 1),
        ),
    ]
    fits = [
        words.removesuffix(": ")
        for words, nbytes in mistakes
        if nbytes > 0 and not _close(nbytes, total) and _close(got, cost.flops / nbytes)
    ]
    return ", or ".join(dict.fromkeys(fits)) + ": " if fits else ""


def check_time_per_output_token(impl: Callable[[ModelDims, Sequence[int], Roof], float]) -> int:
    """Few sequences, where memory is the limit; many, where computing is; then random batches and machines."""
    count = 0
    for model, contexts, roof in _decodes():
        count += 1
        got = call(impl, model=model, contexts=contexts, roof=roof)
        want = time_per_output_token(model, contexts, roof)
        expect(_is_number(got), "a time in seconds is a number", want)
        cost = step_cost(model, [ChunkShape(1, past) for past in contexts])
        memory, compute = cost.bytes / roof.bandwidth_bytes_per_s, cost.flops / roof.peak_flops_per_s
        alone = sum(roof.seconds(step_cost(model, [ChunkShape(1, past)])) for past in contexts)
        parts = f"moving {cost.bytes:,} bytes takes {memory:.4g} s, computing {cost.flops:,} FLOPs {compute:.4g} s"
        guess = _guess_time(memory, compute, alone, len(contexts), float(got))
        expect(_close(got, want), f"{guess}{parts}", want)
    return count


def _decodes() -> Iterator[tuple[ModelDims, list[int], Roof]]:
    memory_bound, compute_bound = Roof(1e3, 1e6), Roof(1e6, 1e3)
    for model in (TOY, ODD):
        for roof in (memory_bound, compute_bound):
            yield model, [3], roof
            yield model, [0], roof
            yield model, [3, 3], roof
            yield model, [3, 8, 0], roof
    rng = random.Random(1)
    h100_like, cpu_like = Roof(3e12, 8e14), Roof(3e10, 2e11)
    for model, roof in itertools.product((SMOLLM2, QWEN3_8B), (h100_like, cpu_like)):
        for batch in (1, 2, 7, 32, 300, 2000):
            yield model, [rng.randint(0, 50) for _ in range(batch)], roof
            yield model, [rng.randint(0, 9000) for _ in range(batch)], roof
    for _ in range(40):
        contexts = [rng.randint(0, 400) for _ in range(rng.randint(1, 6))]
        yield rng.choice(MODELS), contexts, Roof(10 ** rng.uniform(2, 12), 10 ** rng.uniform(2, 15))


def _guess_time(memory: float, compute: float, alone: float, sequences: int, got: float) -> str:
    want = max(memory, compute)
    mistakes = {
        "nothing is divided: one step serves all: ": want / sequences,
        "they don't take turns: one step serves all: ": alone,
        "at the same time, so not the sum: ": memory + compute,
        "the slower of the two sets the pace: ": min(memory, compute),
        "that is in milliseconds: ": want * 1e3,
    }
    for words, seconds in mistakes.items():
        if not _close(seconds, want) and _close(got, seconds):
            return words
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _close(left: Any, right: float) -> bool:
    return math.isclose(float(left), right, rel_tol=1e-9)


EXERCISES = (
    Exercise(
        name="cost.arithmetic_intensity",
        notebook="01",
        reference=arithmetic_intensity,
        check=check_arithmetic_intensity,
        hints=(
            "Four kinds of bytes: the weights, once, whoever shares the step; the KV that each sequence reads, "
            "up to and including its new tokens; the KV of new tokens, written; and what goes through the "
            "matrix products, for which the model has a method.",
            "`tokens` is the sum of the counts, `drawn` the number of chunks with `samples`. Weights: "
            "`token_weights`, and `vocab_weights` if `drawn` is not 0, times `weight_itemsize`. KV: every "
            "chunk reads `past + count` tokens and writes `count`, each of `kv_bytes_per_token`.",
            "`kv = sum(c.past + 2 * c.count for c in chunks) * model.kv_bytes_per_token`; "
            "`weights = (model.token_weights + (model.vocab_weights if drawn else 0)) * model.weight_itemsize`; "
            "return `step_flops(model, chunks) / (weights + kv + model.activation_bytes(tokens, drawn))`.",
        ),
    ),
    Exercise(
        name="cost.time_per_output_token",
        notebook="01",
        reference=time_per_output_token,
        check=check_time_per_output_token,
        hints=(
            "A decode step gives every running sequence one token. So the time between two tokens of one "
            "sequence is the time of a step. What does a step move, and what does it compute?",
            "Each sequence is a `ChunkShape(1, past)`. `step_cost` counts the bytes and FLOPs of all of them "
            "together. Memory and arithmetic work at the same time: which of the two takes longer?",
            "`cost = step_cost(model, [ChunkShape(1, past) for past in contexts])`; return "
            "`max(cost.bytes / roof.bandwidth_bytes_per_s, cost.flops / roof.peak_flops_per_s)`.",
        ),
    ),
)
