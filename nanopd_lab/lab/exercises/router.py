"""Exercises on where a request should run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

from scipy.special import ndtri

from nanopd_lab.core import Route, SamplingParams
from nanopd_lab.lab.checking import Steps, call, expect
from nanopd_lab.lab.registry import Exercise
from nanopd_lab.router import JobView, Role, Slo, WorkerView, legal_routes
from nanopd_lab.router.pair_rule import (
    Estimate,
    Rule,
    StepSeconds,
    first_fit,
    time_to_first_token,
)
from nanopd_lab.router.predictor.conjugate import NormalInverseGamma
from nanopd_lab.router.predictor.log_lengths import LogLengths

# ---------------------------------------------------------------------- what a route takes


@dataclass(frozen=True)
class StepLine:
    """Step times of a check, in ms: so much, and so much for each token and output; whole ones read well."""

    base: float
    token: float
    output: float

    def __call__(self, tokens: int, outputs: int) -> float:
        return (self.base + self.token * tokens + self.output * outputs) / 1e3

    def __repr__(self) -> str:
        return f"{self.base:g} ms + {self.token:g} ms/token + {self.output:g} ms/output"


def check_ttft(impl: Callable[[int, int, int, int, StepSeconds], float]) -> int:
    """By hand, one mistake each; then all small cases; then random ones."""
    count = 0
    for queued, prompt, outputs, budget, step_s in _queues():
        count += 1
        inputs: dict[str, Any] = {
            "queued_tokens": queued,
            "prompt_tokens": prompt,
            "outputs": outputs,
            "budget": budget,
        }
        got = call(impl, **inputs, step_s=step_s)
        want = time_to_first_token(queued, prompt, outputs, budget, step_s)
        expect(_is_number(got), "a time in seconds is a number", want)
        right = math.isclose(float(got), want, rel_tol=1e-9, abs_tol=1e-12)
        if not right:
            expect(right, _guess_ttft(queued, prompt, outputs, budget, step_s, float(got)), want)
    return count


def _queues() -> Iterator[tuple[int, int, int, int, StepLine]]:
    plain, busy = StepLine(10, 1, 0), StepLine(10, 1, 2)
    yield 0, 50, 0, 100, plain
    yield 0, 200, 0, 100, plain
    yield 0, 250, 0, 100, plain
    yield 0, 250, 20, 100, busy
    yield 120, 60, 0, 100, plain
    yield 700, 800, 12, 512, busy
    yield 30, 40, 90, 100, busy
    yield 0, 0, 5, 100, busy
    for queued in (0, 1, 9, 10, 11):
        for prompt in (1, 9, 10, 11, 20):
            for outputs in (0, 3, 9):
                yield queued, prompt, outputs, 10, busy
    rng = random.Random(0)
    for _ in range(60):
        budget = rng.choice((64, 100, 512, 2048))
        outputs = rng.choice((0, rng.randint(1, budget - 1)))
        step_s = StepLine(rng.randint(1, 9), rng.choice((0.5, 1)), rng.choice((0.25, 2)))
        yield rng.choice((0, rng.randint(1, 5000))), rng.randint(1, 5000), outputs, budget, step_s


def _guess_ttft(queued: int, prompt: int, outputs: int, budget: int, step_s: StepLine, got: float) -> str:
    """Which of the usual mistakes gives exactly that, in words; else how many steps it takes."""

    def seconds(tokens: int, room: int, beside: int) -> float:
        return time_to_first_token(0, tokens, beside, room + beside, step_s)

    tokens, room = queued + prompt, budget - outputs
    steps = -(-tokens // room)
    mistakes = [
        ("the queue's tokens come first, in the same steps", seconds(prompt, room, outputs)),
        (
            "each output takes one token of a step's budget: prompts get the rest",
            seconds(tokens, budget, outputs),
        ),
        ("the outputs are in every step too, and take their time", seconds(tokens, room, 0)),
        ("the last step computes only what is left", steps * step_s(room, outputs)),
        ("a step has no more tokens than its budget: a long prompt takes several", step_s(tokens, outputs)),
        ("the last step counts too, though it is not full", tokens // room * step_s(room, outputs)),
        (
            "a step that has room behind the queue goes on with the prompt at once",
            seconds(queued, room, outputs) + seconds(prompt, room, outputs),
        ),
        ("seconds, not milliseconds", 1e3 * seconds(tokens, room, outputs)),
    ]
    for words, wrong in mistakes:
        if math.isclose(got, wrong, rel_tol=1e-9, abs_tol=1e-12):
            return words
    return f"{tokens} tokens in steps with room for {room} are {steps} steps"


# ---------------------------------------------------------------------- a rule


class _Table:
    """Estimates of a check: a made-up one for each pair."""

    def __init__(self, rows: dict[tuple[str, str], Estimate]) -> None:
        self.rows = rows

    def __call__(self, source: WorkerView, target: WorkerView) -> Estimate:
        return self.rows[source.name, target.name]


PROMISED = Slo(0.4, 0.01)


@dataclass(frozen=True)
class _Choice:
    """A request that waits for a route."""

    workers: tuple[WorkerView, ...]
    rows: dict[tuple[str, str], Estimate]
    slo: Slo = PROMISED
    avoid: frozenset[str] = frozenset()

    @property
    def described(self) -> list[str]:
        roles = ", ".join(f"{view.name} {view.role.value}" for view in self.workers)
        promised = f"promised: {1e3 * self.slo.ttft_s:g} ms, {1e3 * self.slo.tpot_s:g} ms a token"
        failed = f"; {', '.join(sorted(self.avoid))} failed it before" if self.avoid else ""
        return [f"workers: {roles or 'none'}; {promised}{failed}"]

    def missed(self, route: Route) -> int:
        return sum(self.rows[route].missed(self.slo).values())

    def told(self, route: Route) -> str:
        """What a pair would do, and what of that is too much."""
        each = self.rows[route]
        broken = [name.replace("_", " ") for name, n in each.missed(self.slo).items() if n]
        others = (
            f"; {each.outputs} outputs from {1e3 * each.before_s:.3g} to {1e3 * each.after_s:.3g}"
            if each.outputs
            else ""
        )
        missed = f": breaks {self.missed(route)} ({', '.join(broken)})" if broken else ": breaks none"
        return f"{route} {1e3 * each.ttft_s:.3g} ms, {1e3 * each.tpot_s:.3g} ms a token{others}{missed}"


def check_rule(impl: Rule) -> int:
    """By hand, one mistake each; then random clusters. Any pair that breaks the fewest promises is right."""
    count, name = 0, getattr(impl, "__name__", "rule")
    for choice in _choices():
        count += 1
        steps = Steps(choice.described[0])
        job = JobView(500, 500, SamplingParams(max_tokens=200), 0.0, choice.avoid)
        given = list(choice.workers)
        got = steps.do(
            f"{name}(job, workers, estimate, slo)", impl, job, given, _Table(choice.rows), choice.slo
        )
        steps.expect(
            given == list(choice.workers), "workers must stay as they are", "the list as it was", "changed"
        )
        _judge(steps, choice, got)
    return count


def _judge(steps: Steps, choice: _Choice, got: Any) -> None:
    legal = legal_routes(choice.workers)
    if not legal:
        steps.expect(got is None, "no pair of them may do it: it has to wait", "None")
        return
    others = [route for route in legal if not choice.avoid & set(route)] or legal
    fewest = min(map(choice.missed, others))
    best = next(route for route in others if choice.missed(route) == fewest)
    want = f"for example Route({best.prefill!r}, {best.decode!r})"
    steps.expect(got is not None, "a pair that may do it is there: waiting gains nothing", want, "None")
    steps.expect(isinstance(got, tuple) and len(got) == 2, "a Route(prefill, decode) is wanted", want)
    names = {view.name: view for view in choice.workers}
    for part in got:
        steps.expect(isinstance(part, str) and part in names, "a Route holds names of workers", want)
    route = Route(*got)
    source, target = names[route.prefill], names[route.decode]
    steps.expect(source.role.prefills, f"{source.name} only decodes: it cannot be the source", want)
    steps.expect(target.role.decodes, f"{target.name} only prefills: it cannot be the target", want)
    failed = sorted(choice.avoid & set(route))
    steps.expect(
        route in others, f"{', '.join(failed)} failed this request before, and others may do it", want
    )
    steps.expect(choice.missed(route) == fewest, f"{choice.told(route)}; but {choice.told(best)}", want)


def _choices() -> Iterator[_Choice]:
    fine, late, slow = Estimate(0.1, 0.008), Estimate(0.9, 0.008), Estimate(0.1, 0.02)
    bad = Estimate(0.9, 0.02)
    mixed = tuple(WorkerView(name, Role.MIXED) for name in ("w0", "w1"))
    split = WorkerView("w0", Role.PREFILL), WorkerView("w1", Role.DECODE)

    def rows(
        workers: Sequence[WorkerView], default: Estimate, **each: Estimate
    ) -> dict[tuple[str, str], Estimate]:
        found = {(a.name, b.name): default for a in workers for b in workers}
        return found | {(key[:2], key[3:]): value for key, value in each.items()}

    yield _Choice((), {})
    yield _Choice(split[:1], rows(split, fine))
    yield _Choice(split[1:], rows(split, fine))
    yield _Choice(split, rows(split, fine))
    yield _Choice(split[::-1], rows(split, fine, w0_w1=bad))
    yield _Choice(mixed[:1], rows(mixed, bad))
    for good in ("w0_w0", "w0_w1", "w1_w0", "w1_w1"):
        yield _Choice(mixed, rows(mixed, late, **{good: fine}))
        yield _Choice(mixed, rows(mixed, slow, **{good: fine}))
        yield _Choice(mixed, rows(mixed, bad, **{good: slow}))
        yield _Choice(mixed, rows(mixed, bad, **{good: late}))
        # Its own promises are kept everywhere, but five others break theirs.
        yield _Choice(
            mixed, rows(mixed, Estimate(0.1, 0.008, 5, 0.009, 0.011), **{good: Estimate(0.3, 0.009)})
        )
        # One of its own is cheaper than five of others.
        yield _Choice(mixed, rows(mixed, Estimate(0.1, 0.008, 5, 0.009, 0.011), **{good: late}))
        # Outputs that miss anyway, or still keep theirs, are none that it breaks.
        yield _Choice(mixed, rows(mixed, bad, **{good: Estimate(0.1, 0.008, 5, 0.012, 0.015)}))
        yield _Choice(mixed, rows(mixed, late, **{good: Estimate(0.1, 0.008, 9, 0.004, 0.009)}))
        yield _Choice(
            mixed, rows(mixed, Estimate(0.401, 0.001), **{good: Estimate(0.4, 0.01)})
        )  # kept to the limit
    yield _Choice(mixed, rows(mixed, fine), avoid=frozenset({"w0"}))
    yield _Choice(mixed, rows(mixed, fine, w1_w1=bad), avoid=frozenset({"w0"}))
    yield _Choice(mixed, rows(mixed, fine), avoid=frozenset({"w0", "w1"}))
    yield _Choice(split, rows(split, fine), avoid=frozenset({"w1"}))
    rng = random.Random(0)
    for _ in range(150):
        workers = tuple(
            WorkerView(f"w{n}", rng.choice([*Role, Role.MIXED, Role.MIXED])) for n in range(rng.randint(1, 4))
        )
        table = {
            (a.name, b.name): Estimate(
                rng.uniform(0.05, 0.8), rng.uniform(0.004, 0.02), rng.choice((0, 0, 1, 4)),
                before := rng.uniform(0.004, 0.012), before + rng.uniform(0, 0.006),
            )
            for a in workers
            for b in workers
        }  # fmt: skip
        avoid = frozenset(view.name for view in workers if rng.random() < 0.15)
        yield _Choice(workers, table, Slo(rng.choice((0.2, 0.4)), rng.choice((0.008, 0.012))), avoid)


# ---------------------------------------------------------------------- lengths


def check_lengths(impl: Callable[[NormalInverseGamma], LogLengths]) -> int:
    """One output that ended and one that was cut, by hand; then lives of a belief, with quantiles on the way."""
    count = 0
    for belief, life in _lives():
        steps = Steps(f"belief: {_shown(belief)}")
        made: list[Any] = []
        name = getattr(impl, "__name__", "LogLengths")
        steps.do(f"lengths = {name}(belief)", lambda: made.append(impl(belief)))  # noqa: B023
        lengths, right = made[0], LogLengths(belief)
        _compare_beliefs(steps, lengths, right.belief, "it begins with the belief that it was given", [])
        for what in life:
            count += 1
            if isinstance(what, float):
                _quantile(steps, lengths, right, what)
                continue
            tokens, censored = what
            before = right.belief
            right.observe(tokens, censored)
            steps.do(f"lengths.observe({tokens}, {censored})", lengths.observe, tokens, censored)
            why = "the update of the concept, on the logarithm of the length"
            _compare_beliefs(steps, lengths, right.belief, why, _wrong_updates(before, tokens, censored))
    return count


def _lives() -> Iterator[tuple[NormalInverseGamma, list[Any]]]:
    weak = NormalInverseGamma(5.0, 1.0, 1.0, 4.0)
    yield weak, [(1097, False), (1097, False)]
    yield weak, [(20, False), (400, False), 0.5, 0.9]
    yield weak, [0.5, 0.1, 0.95]
    yield weak, [(148, True), (3000, True), (1, True), 0.5]
    rng = random.Random(0)
    for _ in range(25):
        belief = NormalInverseGamma(
            rng.uniform(2, 7), rng.choice((0.5, 2.0, 8.0)), rng.uniform(0.3, 2), rng.uniform(3, 9)
        )
        life: list[Any] = []
        for _ in range(rng.randint(2, 7)):
            life.append(
                rng.choice(((rng.randint(1, 4000), rng.random() < 0.3), rng.choice((0.05, 0.5, 0.9))))
            )
        yield belief, life


def _compare_beliefs(
    steps: Steps,
    lengths: Any,
    want: NormalInverseGamma,
    why: str,
    mistakes: list[tuple[str, tuple[float, ...]]],
) -> None:
    found = getattr(lengths, "belief", None)
    steps.expect(
        isinstance(found, NormalInverseGamma), "`belief` is a NormalInverseGamma, which others read", _shown(want),
        type(found).__name__,
    )  # fmt: skip
    assert isinstance(found, NormalInverseGamma)
    if _near(found, want):
        return
    words = next((words for words, wrong in mistakes if _near(found, wrong)), "")
    if not words:
        field = next(n for n, a, b in zip(want._fields, found, want, strict=True) if not _near((a,), (b,)))
        words = f"{why}: {field} is wrong"
    steps.expect(False, words, _shown(want), _shown(found))


def _shown(belief: NormalInverseGamma) -> str:
    return ", ".join(
        f"{name} {value:.6g}" if _is_number(value) else f"{name} {value!r}"
        for name, value in belief._asdict().items()
    )


def _near(left: Sequence[Any], right: Sequence[float]) -> bool:
    return all(
        _is_number(a) and math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-12)
        for a, b in zip(left, right, strict=True)
    )


def _wrong_updates(
    before: NormalInverseGamma, tokens: int, censored: bool
) -> list[tuple[str, tuple[float, ...]]]:
    """Beliefs that the usual mistakes lead to."""

    def update(value: float, spread: float = 0.0, share: float | None = None) -> tuple[float, ...]:
        mean, strength, variance, df = before
        gap = value - mean
        squares = df * variance + (gap**2 + spread) * (strength / (strength + 1) if share is None else share)
        return mean + gap / (strength + 1), strength + 1, squares / (df + 1), df + 1

    log = math.log(tokens)
    found = [
        ("the belief is of the *logarithm* of the length", update(float(tokens))),
        ("the natural logarithm, which `quantile` undoes with exp", update(math.log10(tokens))),
    ]
    if censored:
        expected, spread = before.predictive.moments_beyond(log)
        plain = update(expected)
        found = [
            ("an output that was cut off says something: it is longer than that", tuple(before)),
            (
                "it was cut off and would have gone on: it counts as what is expected of longer ones",
                update(log),
            ),
            ("longer ones are not all alike: their variance goes into the squares", plain),
            (
                "the variance beyond counts as a gap's square does, by strength / (strength + 1)",
                (*plain[:2], plain[2] + spread / (before.df + 1), plain[3]),
            ),
            *found,
        ]
        right, all_of_it = update(expected, spread), update(expected, spread, 1.0)
    else:
        right, all_of_it = update(log), update(log, share=1.0)
    return [
        *found,
        (
            "the squares take strength / (strength + 1) of the gap's square: the mean was not certain",
            all_of_it,
        ),
        (
            "variance is squares / df, with the new df",
            (*right[:2], right[2] * (before.df + 1) / before.df, right[3]),
        ),
        ("the variance is learnt too, not only the mean", (*right[:2], before.variance, right[3])),
        ("an observation more: strength grows by 1", (right[0], before.strength, *right[2:])),
        ("an observation more: df grows by 1", (*right[:3], before.df)),
    ]


def _quantile(steps: Steps, lengths: Any, right: LogLengths, p: float) -> None:
    got = steps.do(f"lengths.quantile({p})", lengths.quantile, p)
    want = right.quantile(p)
    steps.expect(_is_number(got), "a number of tokens is wanted; is a `return` missing?", f"{want:.6g}")
    belief, t = right.belief, right.belief.predictive
    step = math.log(want) - t.mean
    own = math.sqrt(
        1 + 1 / belief.strength
    )  # by how much the predictive is wider than the output's own scale
    mistakes = [
        ("the belief is of log lengths: exp gives tokens", t.mean + step),
        (
            "Student's t, not a normal: with little evidence its tails are longer",
            math.exp(t.mean + t.scale * float(ndtri(p))),
        ),
        ("`p` of the outputs are at most so long, not 1 - p", math.exp(t.mean - step)),
        (
            "of the next *output*, not of the mean: its own variance is in the predictive",
            math.exp(t.mean + step / math.sqrt(belief.strength + 1)),
        ),
        ("the mean is not certain either: `belief.predictive` has both", math.exp(t.mean + step / own)),
    ]
    near = math.isclose(float(got), want, rel_tol=1e-6)
    words = next((w for w, wrong in mistakes if math.isclose(float(got), wrong, rel_tol=1e-6)), "")
    shown = f"{got:.6g}", f"{want:.6g}"
    steps.expect(
        near, words or "the quantile of `belief.predictive`, in tokens, not rounded", shown[1], shown[0]
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


EXERCISES = (
    Exercise(
        name="router.ttft",
        notebook="08",
        reference=time_to_first_token,
        check=check_ttft,
        hints=(
            "Play it: a step takes as many prompt tokens as it has room for. How much room is that, with `outputs` "
            "outputs in it? And whose tokens come first?",
            "`left = queued_tokens + prompt_tokens`. While some are left: a chunk is the smaller of `left` and "
            "`budget - outputs`; add the step's time and take the chunk off.",
            "`while left > 0: chunk = min(left, budget - outputs); seconds += step_s(chunk, outputs); left -= chunk`",
        ),
        router_plug=lambda parts, impl: replace(parts, ttft=impl),
    ),
    Exercise(
        name="router.rule",
        notebook="08",
        reference=first_fit,
        check=check_rule,
        hints=(
            "Go through all pairs whose roles allow it and give each a key; the smallest key wins. What must come "
            "first in the key, what second, and what only decides between equals?",
            "`estimate(source, target).missed(slo)` counts broken promises by kind: add up its values. Pairs with a "
            "worker in `job.avoid` come last. For equal ones think of the next request: if prompts and outputs are "
            "everywhere, every output is disturbed.",
            "`pairs = [(s, t) for s in workers if s.role.prefills for t in reversed(workers) if t.role.decodes]`; "
            "return None if it is empty; `s, t = min(pairs, key=lambda p: (bool(job.avoid & {p[0].name, p[1].name}), "
            "sum(estimate(*p).missed(slo).values())))`: `min` takes the first of equals, so prompts go to the front "
            "and outputs to the back. Add what a pair exceeds the promises by as a third part of the key.",
        ),
        router_plug=lambda parts, impl: replace(parts, rule=impl),
    ),
    Exercise(
        name="router.lengths",
        notebook="08",
        reference=LogLengths,
        check=check_lengths,
        hints=(
            "`observe`: four numbers become four others, as worked by hand in the concept, with x = log(tokens). "
            "`quantile`: `self.belief.predictive` is Student's t of the logarithm, and has a `quantile` of its own.",
            "An output that was cut off has an x that nobody knows: `predictive.moments_beyond(log(tokens))` gives the "
            "mean and the variance of those beyond. Take the mean for x, and add the variance to the gap's square. "
            "What undoes the logarithm in `quantile`?",
            "`x, spread = math.log(tokens), 0.0`; if censored `x, spread = self.belief.predictive.moments_beyond(x)`; "
            "`squares = df * variance + ((x - mean)**2 + spread) * strength / (strength + 1)`; the new belief is "
            "`NormalInverseGamma(mean + (x - mean) / (strength + 1), strength + 1, squares / (df + 1), df + 1)`. "
            "`quantile`: `math.exp(self.belief.predictive.quantile(p))`.",
        ),
        router_plug=lambda parts, impl: replace(parts, lengths=impl),
    ),
)
