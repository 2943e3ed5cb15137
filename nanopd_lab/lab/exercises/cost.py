"""Exercises on what a step costs."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from nanopd_lab.cost.fitting import Array, FitError, StepSample, fit_terms, held_out_error
from nanopd_lab.cost.iteration import IterationModel, StepFeatures
from nanopd_lab.cost.roofline import (
    ChunkShape,
    ModelDims,
    Roof,
    arithmetic_intensity,
    step_cost,
    time_per_output_token,
)
from nanopd_lab.lab.checking import Steps, call, expect
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


FEATURES = (
    "tokens",
    "drawn",
    "pairs",
    "context",
    "sequences",
)  # `short_pairs` and `shared_context` matter on GPUs only, and are not asked for


def check_features(impl: Callable[[Sequence[ChunkShape]], StepFeatures]) -> int:
    """One chunk of each kind, then several, then random mixtures; each total by itself."""
    count = 0
    for chunks in _chunk_lists():
        count += 1
        got = call(impl, chunks=chunks)
        want = StepFeatures.of(chunks)
        kind = "a StepFeatures(tokens, drawn, pairs, context, sequences) is wanted"
        expect(isinstance(got, StepFeatures), kind, want)
        for name in FEATURES:
            value, right = getattr(got, name), getattr(want, name)
            expect(_is_number(value), f"{name} is a number", want)
            expect(_close(value, right), _why_feature(name, chunks, float(value), right), want)
    return count


def _chunk_lists() -> Iterator[Sequence[ChunkShape]]:
    yield [ChunkShape(4, 6, 0), ChunkShape(1, 9)]  # the notebook's own
    yield [ChunkShape(1, 0)]
    yield [ChunkShape(1, 7)]
    yield [ChunkShape(7)]
    yield [ChunkShape(7, samples=0)]
    yield [ChunkShape(3, 5, samples=0)]
    yield (ChunkShape(1, 9), ChunkShape(1, 9))  # as the profiler has them: a tuple, and two alike
    yield [ChunkShape(1, 400)] * 32
    yield [ChunkShape(8191, 16_384)]
    yield [ChunkShape(5, 0, 0), ChunkShape(5, 0, 0), ChunkShape(1, 3), ChunkShape(2, 1)]
    rng = random.Random(2)
    for number in range(110):
        chunks = [
            ChunkShape(
                rng.choice((1, 1, rng.randint(2, 500))),
                rng.choice((0, rng.randint(1, 2000))),
                rng.randint(0, 1),
            )
            for _ in range(rng.randint(1, 6))
        ]
        yield chunks if number % 2 else tuple(chunks)


def _why_feature(name: str, chunks: Sequence[ChunkShape], got: float, want: float) -> str:
    """The total in words, after the usual mistake that gives exactly this."""
    halves = sum(chunk.count for chunk in chunks) / 2
    squares = sum(chunk.count**2 for chunk in chunks)
    right = {
        "tokens": "new tokens of all chunks: Σ q",
        "drawn": "chunks that draw a token (`samples`); the middle of a prompt draws none",
        "pairs": "Σ q(k + q/2): each new token looks at the past, and on average at half of the new ones",
        "context": "Σ (k + q): K and V of the past and of the new tokens are read",
        "sequences": "a chunk for each sequence, also where two are alike",
    }[name]
    mistakes: dict[str, list[tuple[str, float]]] = {
        "tokens": [("the past is computed already: ", sum(c.past + c.count for c in chunks))],
        "drawn": [
            ("not every chunk draws: ", len(chunks)),
            ("a chunk draws one token at most: ", sum(c.count for c in chunks)),
        ],
        "pairs": [
            ("nobody looks at later tokens: ", want + squares / 2),
            ("the new tokens look at each other too: ", want - squares / 2),
            (
                "with the diagonal whole it is q/2 more for each chunk; the model leaves that out: ",
                want + halves,
            ),
            ("q/2 is not a whole number: ", sum(c.count * (c.past + c.count // 2) for c in chunks)),
            (
                "a sequence sees its own tokens only: ",
                sum(c.count for c in chunks) * sum(c.past + c.count / 2 for c in chunks),
            ),
        ],
        "context": [
            ("the new tokens' K and V are read too: ", sum(c.past for c in chunks)),
            (
                "they are read once a chunk, not once a token: ",
                sum(c.count * (c.past + c.count) for c in chunks),
            ),
        ],
        "sequences": [("alike is not the same: ", len(set(chunks)))],
    }
    for words, value in mistakes[name]:
        if not _close(value, want) and _close(got, value):
            return f"{words}{name}: {right}, is {want:g}"
    return f"{name} is {got:g}, not {want:g}: {right}"


def check_fit(impl: Callable[[Array, Array], Array]) -> int:
    """By hand, then planted coefficients, a term that explains nothing, one that pulls below zero, and noise.

    What counts is the error that is left: where two terms are alike, many coefficients are right.
    """
    count = 0
    for terms, seconds in _fits():
        count += 1
        got = call(impl, terms=terms, seconds=seconds)
        want = fit_terms(terms, seconds)
        expect(got is not None, "coefficients are wanted", want)
        try:
            found = np.asarray(got, dtype=float)
        except (TypeError, ValueError):
            found = np.empty(0)
        expect(found.shape == want.shape, f"one coefficient for each of {len(want)} terms", want)
        expect(
            bool(np.isfinite(found).all()),
            "a coefficient is a finite number, also of a term no step has",
            want,
        )
        low = float(found.min())
        expect(low >= 0, f"{low:.3g} s for one of something: no part of a step gives time back", want)
        best, left = _loss(terms, seconds, want), _loss(terms, seconds, found)
        near = left <= 1.001 * best + 1e-9 * len(seconds)
        why = f"squared relative errors add up to {left:.4g}; {best:.4g} can be had"
        expect(near, why if near else _guess_fit(terms, seconds, found) + why, want)
    return count


def _fits() -> Iterator[tuple[Array, Array]]:
    yield np.array([[1.0], [1.0]]), np.array([0.01, 0.1])  # the notebook's own
    yield np.array([[1.0], [2.0], [4.0]]), np.array([0.5, 1.0, 2.0])
    yield np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0])
    yield np.array([[2.0, 0.0], [5.0, 0.0]]), np.array([1.0, 2.0])
    yield np.array([[1.0, 1.0, 3.0], [1.0, 1.0, 7.0], [1.0, 1.0, 1.0]]), np.array([5.0, 9.0, 3.0])
    rng = np.random.default_rng(0)
    scale = np.array([5e-3, 2e-5, 1e-10, 4e-8, 1e-5])
    for number in range(110):
        steps, size = int(rng.integers(6, 40)), int(rng.integers(2, 6))
        # A step's terms as they are: one of the first, thousands of tokens, millions of pairs.
        terms = np.exp(rng.normal(0, 1.5, (steps, size))) / scale[:size] * 1e-2
        terms[:, 0] = 1.0
        planted = scale[:size] * rng.uniform(0.2, 3.0, size)
        if number % 3 == 1:
            planted[int(rng.integers(0, size))] *= -0.3  # something that no part of a step can explain
        if number % 3 == 2:
            planted[int(rng.integers(0, size))] = 0.0
        if number % 10 == 7:
            terms[:, -1] = 0.0
        seconds = np.abs(terms @ planted) * np.exp(rng.normal(0, (0.0, 0.05, 0.3)[number % 3], steps)) + 1e-5
        yield terms, seconds


def _loss(terms: Array, seconds: Array, found: Array) -> float:
    return float(((terms @ found / seconds - 1) ** 2).sum())


def _guess_fit(terms: Array, seconds: Array, found: Array) -> str:
    """Which of the usual mistakes gives these coefficients, in words; else nothing."""
    from scipy.optimize import nnls

    scaled = terms / seconds[:, None]
    free = np.linalg.lstsq(scaled, np.ones(len(seconds)), rcond=None)[0]
    size = np.linalg.norm(terms, axis=0)
    size[size == 0] = 1.0
    absolute = nnls(terms / size, seconds)[0] / size
    mistakes = [
        ("that is the least error in seconds, where long steps are all that counts: ", absolute),
        (
            "cutting off what is negative is not enough, the others must be fitted again: ",
            np.maximum(free, 0.0),
        ),
    ]
    if len(size) > 1:
        rest = np.r_[0.0, fit_terms(terms[:, 1:], seconds)]
        mistakes.append(("the first term counts too: ", rest))
    for words, wrong in mistakes:
        if found.shape == wrong.shape and np.allclose(
            found, wrong, rtol=1e-5, atol=1e-12 * float(wrong.max())
        ):
            return words
    return ""


def check_held_out(
    impl: Callable[[IterationModel, Sequence[StepSample], Sequence[StepSample]], FitError],
) -> int:
    """By hand, then steps that were timed twice, then random ones."""
    count, name = 0, getattr(impl, "__name__", "held_out_error")
    for model, samples, fitted in _held_out():
        count += 1
        steps = Steps(_described(model, samples, fitted))
        given = (model, list(samples), list(fitted))
        got = steps.do(f"{name}(model, samples, fitted)", impl, *given)
        unchanged = given[1] == samples and given[2] == fitted
        steps.expect(unchanged, "the caller still needs both lists", "the lists as they were", "others")
        want = held_out_error(model, samples, fitted)
        steps.expect(isinstance(got, FitError), "a FitError(count, mean, maximum) is wanted", repr(want))
        values = (got.count, got.mean, got.maximum)
        steps.expect(all(map(_is_number, values)), "count, mean and maximum are numbers", repr(want))
        known = {s.step for s in fitted}
        why = _guess_held_out(model, [s for s in samples if s.step not in known], samples, fitted, got)
        steps.expect(got.count == want.count, why or f"{want.count} steps are new to the model", repr(want))
        near = [
            math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
            for a, b in zip(values, vars(want).values(), strict=True)
        ]
        steps.expect(all(near), why or "mean and maximum of |predicted / measured - 1|", repr(want))
    [sample] = _timed([(5, 0)], 1.0)
    steps = Steps("a step, and the same step timed again")
    again = replace(sample, seconds=2 * sample.seconds)
    steps.do(f"{name}(model, [again], [step])", impl, _MODEL, [again], [sample], raises=ValueError)
    return count + 1


_MODEL = IterationModel(0.01, 0.04, 0.002, 1e-6, 4e-6, 7e-4, vocab_share=0.25, sharpness=2.0)


def _timed(shapes: Sequence[tuple[int, int]], factor: float) -> list[StepSample]:
    steps = [StepFeatures.of([ChunkShape(count, past)]) for count, past in shapes]
    return [StepSample(step, factor * _MODEL.of_features(step)) for step in steps]


def _held_out() -> Iterator[tuple[IterationModel, list[StepSample], list[StepSample]]]:
    slow, fast = _timed([(5, 0), (7, 3)], 1.25), _timed([(1, 90)], 0.5)
    yield _MODEL, [*slow, *fast], []
    yield _MODEL, [*slow, *fast], fast
    yield _MODEL, [*fast, *slow], slow[:1]
    again = [replace(s, seconds=s.seconds * 1.01) for s in slow]
    yield _MODEL, [*fast, *slow], again  # the same steps, timed once more
    yield _MODEL, [*fast, *fast, *slow], slow  # and a new step that was timed twice counts twice
    yield replace(_MODEL, host_s=0.1), [*slow, *fast], slow
    rng = random.Random(3)
    for _ in range(110):
        shapes = [(rng.randint(1, 300), rng.randint(0, 900)) for _ in range(rng.randint(2, 12))]
        samples = [s for shape in shapes for s in _timed([shape], rng.uniform(0.4, 2.5))]
        fitted = rng.sample(samples, rng.randint(0, len(samples) - 1))
        fitted += [
            replace(s, seconds=s.seconds * rng.uniform(0.9, 1.1))
            for s in rng.sample(fitted, len(fitted) // 2)
        ]
        if {s.step for s in samples} - {s.step for s in fitted}:
            yield _MODEL, samples, fitted


def _described(model: IterationModel, samples: Sequence[StepSample], fitted: Sequence[StepSample]) -> str:
    """A letter for each step, with its error; what was fitted, with ′ where another time was measured for it."""
    letters = {step: chr(65 + n) for n, step in enumerate(dict.fromkeys(s.step for s in samples))}
    shown = [f"{letters[s.step]} {model.of_features(s.step) / s.seconds - 1:+.0%}" for s in samples]
    known = [letters[s.step] + "′" * (s not in samples) for s in fitted]
    again = " (′: the step, timed again)" if any("′" in each for each in known) else ""
    return f"samples {', '.join(shown[:10])}; fitted {', '.join(known[:10]) or 'none'}{again}"


def _guess_held_out(
    model: IterationModel,
    new: Sequence[StepSample],
    samples: Sequence[StepSample],
    fitted: Sequence[StepSample],
    got: FitError,
) -> str:
    def errors(steps: Sequence[StepSample]) -> list[float]:
        return [model.of_features(s.step) / s.seconds - 1 for s in steps]

    def is_mean(values: Sequence[float]) -> bool:
        return bool(values) and math.isclose(got.mean, sum(values) / len(values), rel_tol=1e-9)

    signed = errors(new)
    sizes = [abs(e) for e in signed]
    other = [s for s in samples if s not in fitted]
    unequal = len(new) != len(samples)
    mistakes = [
        (
            "a step that was fitted is known, also where it was timed again: compare steps, not times",
            len(other) != len(new) and is_mean([abs(e) for e in errors(other)]),
        ),
        (
            "what was fitted is no test: leave those steps out",
            unequal and is_mean([abs(e) for e in errors(samples)]),
        ),
        ("too long and too short must not cancel: sizes of the errors", is_mean(signed)),
        (
            "relative to what was measured, not to what was predicted",
            is_mean([abs(s.seconds / model.of_features(s.step) - 1) for s in new]),
        ),
        ("relative errors, not seconds", is_mean([abs(model.of_features(s.step) - s.seconds) for s in new])),
        ("shares of 1, not of 100", is_mean([100 * e for e in sizes])),
        (
            "the mean, not the root of the mean square",
            is_mean([math.sqrt(sum(e * e for e in sizes) / len(sizes))]),
        ),
    ]
    right = is_mean(sizes)
    return next((words for words, fits in mistakes if fits and not right), "")


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
    Exercise(
        name="cost.features",
        notebook="07",
        reference=StepFeatures.of,
        check=check_features,
        hints=(
            "Five sums over the chunks of the step; q is `chunk.count`, k is `chunk.past`. Each chunk belongs to "
            "another sequence, and nobody looks at another one's tokens: sum products, don't multiply sums.",
            "`drawn` counts the chunks whose `samples` is not 0. `pairs` adds up `q * (k + q / 2)`, with a real "
            "division, and `context` adds up `k + q`.",
            "`return StepFeatures(sum(c.count for c in chunks), sum(c.samples > 0 for c in chunks), "
            "sum(c.count * (c.past + c.count / 2) for c in chunks), sum(c.past + c.count for c in chunks), "
            "len(chunks))`",
        ),
        cost_plug=lambda parts, impl: replace(parts, features=impl),
    ),
    Exercise(
        name="cost.fit_terms",
        notebook="07",
        reference=fit_terms,
        check=check_fit,
        hints=(
            "`nnls(A, b)` finds x ≥ 0 with the least Σ (A·x - b)². You want the least Σ ((terms·x) / seconds - 1)². "
            "What must A and b be?",
            "Divide each *row* of `terms` by what that step took, and let b be all ones. Terms differ by nine "
            "orders of magnitude; dividing each column by its length, and the result too, keeps the numbers tame.",
            "`return nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]`",
        ),
        cost_plug=lambda parts, impl: replace(parts, fit=impl),
    ),
    Exercise(
        name="cost.held_out_error",
        notebook="07",
        reference=held_out_error,
        check=check_held_out,
        hints=(
            "First which: those of `samples` whose step the model has not seen. Then how far: the relative error of "
            "each, without its sign.",
            "A set of `sample.step` over `fitted` says what is known. `model.of_features(sample.step)` is the "
            "prediction; divide by what was measured. With no step left, raise ValueError.",
            "`known = {s.step for s in fitted}`; `found = [abs(model.of_features(s.step) / s.seconds - 1) for s in "
            "samples if s.step not in known]`; if it is empty raise ValueError; `return FitError(len(found), "
            "sum(found) / len(found), max(found))`.",
        ),
        cost_plug=lambda parts, impl: replace(parts, held_out_error=impl),
    ),
)
