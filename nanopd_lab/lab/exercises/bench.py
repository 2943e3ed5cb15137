"""Exercises on measuring a service: when requests come, and what its answers were worth."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from scipy.special import gammainc

from nanopd_lab.bench.goodput import Goodput, Outcome, goodput
from nanopd_lab.lab.checking import Counterexample, call, expect
from nanopd_lab.lab.registry import Exercise
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.arrivals import arrival_times

# ---------------------------------------------------------------------- arrivals

MANY = 3000  # gaps whose distribution is looked at
FARTHEST = 0.05  # of their distribution from the gamma distribution; by chance once in a million (Kolmogorov)


class _Rng(random.Random):
    """Shows how it was made, in a counterexample."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(number)

    def __deepcopy__(self, memo: object) -> _Rng:
        made = _Rng(self.number)
        made.setstate(self.getstate())
        return made

    def __repr__(self) -> str:
        return f"Random({self.number})"


def check_arrivals(impl: Callable[[int, float, float, random.Random], list[float]]) -> int:
    """Small schedules, whose end is known exactly; then the distribution of the gaps of long ones."""
    cases = 0
    for count, rate, burstiness, number in _schedules():
        cases += 1
        inputs: dict[str, Any] = {"count": count, "rate": rate, "burstiness": burstiness}

        def once(seed: int) -> list[float]:
            got = call(impl, may_change=("rng",), **inputs, rng=_Rng(seed))  # noqa: B023
            return _numbers(got, inputs["count"])  # noqa: B023

        times = once(number)
        _judge_times(times, count, rate)
        if rate < math.inf and count > 2:
            again, other = once(number), once(number + 1)
            expect(
                again == times and other != times,
                "draw from `rng` and from nothing else: who is compared must get the same schedule, and another seed "
                "another one",
                "the same times from the same seed, others from another",
                "others from the same seed" if again != times else "the same from another seed",
            )
        if count == MANY:
            _judge_gaps(np.diff([0.0, *times]) * rate, burstiness)
    return cases


def _schedules() -> Iterator[tuple[int, float, float, int]]:
    yield 3, 2.0, 1.0, 0
    for count in (1, 2, 3, 5, 40):
        for rate in (0.1, 2.0, 30.0):
            for burstiness in (0.25, 0.5, 1.0, 2.0, 8.0, 30.0):
                yield count, rate, burstiness, count
    yield 4, math.inf, 1.0, 0
    yield 3, math.inf, 4.0, 1
    for number in range(4):
        for burstiness in (4.0, 1.0, 0.25, 0.5, 2.0, 16.0):
            yield MANY, 5.0, burstiness, number


def _numbers(got: Any, count: int) -> list[float]:
    want = f"{count} times"
    expect(got is not None and hasattr(got, "__len__"), "a list of times in seconds is wanted", want)
    expect(len(got) == count, "one time for each request", want, f"{len(got)} times")
    right = all(isinstance(each, Real) and math.isfinite(each) for each in got)
    expect(right, "times are finite numbers, in seconds", want)
    return [float(each) for each in got]


def _judge_times(times: list[float], count: int, rate: float) -> None:
    if rate == math.inf:
        expect(not any(times), "an infinite rate: all come at once, at 0", [0.0] * count)
        return
    end = count / rate
    rising = all(a <= b for a, b in itertools.pairwise(times))
    expect(rising, "times, not gaps: each request comes a gap after the one before it", "rising times")
    expect(times[0] > 0, "the first request comes after a gap too, as in vLLM", "a first time above 0")
    words = "stretch all times alike, so that the last of them is count / rate: every seed then has that rate"
    for wrong, why in (
        (1e3 * end, "seconds, not milliseconds"),
        ((count - 1) / rate, "count gaps from 0 to the last request, so it comes at count / rate"),
        (rate * end, "the last request comes at count / rate seconds, not at count"),
    ):
        if math.isclose(times[-1], wrong, rel_tol=1e-6) and count > 1:
            words = why
    expect(math.isclose(times[-1], end, rel_tol=1e-6), words, f"the last at {end:.6g}", f"{times[-1]:.6g}")


def _judge_gaps(gaps: np.ndarray, burstiness: float) -> None:
    """Gaps in units of their mean, which is right: their variance, then their whole distribution and their order."""
    variance, want = float(gaps.var()), 1 / burstiness
    words = "the variance of the gaps, in units of their mean, is 1 / burstiness"
    if variance < 0.01 * want:
        words = "all gaps are alike: draw each of them"
    elif _near(variance, burstiness):
        words = (
            "the higher the burstiness, the more even: it is the gamma distribution's shape, not its scale"
        )
    elif _near(variance, want**2):
        words = "the shape is burstiness itself: a gamma distribution's variance is its mean squared / shape"
    elif _near(variance, 1):
        words = "burstiness is the shape of the gamma distribution; these gaps don't know it"
    expect(_near(variance, want), words, f"variance {want:.3g}", f"variance {variance:.3g}")
    ordered = np.sort(gaps)
    far = np.abs(gammainc(burstiness, burstiness * ordered) - (np.arange(len(gaps)) + 0.5) / len(gaps)).max()
    expect(
        far < FARTHEST,
        "mean and variance are right, but gaps of this length are not as frequent as a gamma distribution has them",
        f"at most {FARTHEST:.0%} of the gaps elsewhere",
        f"{far:.0%}",
    )
    follow = float(np.corrcoef(gaps[1:], gaps[:-1])[0, 1])
    expect(
        abs(follow) < 0.15,
        "each gap is drawn by itself: these depend on the one before",
        "a correlation of 0",
        f"{follow:.2f}",
    )


def _near(value: float, want: float) -> bool:
    return abs(value / want - 1) < 0.3


# ---------------------------------------------------------------------- goodput

PROMISED = Slo(0.5, 0.1)
Judged = tuple[float, float]


@dataclass(frozen=True)
class _Run:
    """Some requests and what they were promised."""

    outcomes: tuple[Outcome, ...]
    slo: Slo = PROMISED
    gpus: int = 1

    def before(self) -> list[str]:
        """The requests in words, the first few."""
        shown = [_told(number, each) for number, each in enumerate(self.outcomes[:4])]
        more = len(self.outcomes) - len(shown)
        return shown + ([f"and {more} more"] if more else [])


def _told(number: int, each: Outcome) -> str:
    late = f", sent at {each.sent_s:g}" if each.sent_s != each.scheduled_s else ""
    first = "no token" if each.first_token_s is None else f"first token at {each.first_token_s:g}"
    end = "never ended" if each.ended_s is None else f"ended at {each.ended_s:g}"
    failed = "" if each.ok else ", failed"
    return (
        f"r{number} scheduled {each.scheduled_s:g}{late}, {first}, {end}, {each.output_tokens} tokens{failed}"
    )


def check_goodput(impl: Callable[[Sequence[Outcome], Slo, int], Judged]) -> int:
    """By hand, one mistake each; then random runs."""
    cases = 0
    for run in _runs():
        cases += 1
        name = getattr(impl, "__name__", "goodput")
        written = f"{name}(outcomes, Slo({', '.join(f'{s:g}' for s in run.slo)}), gpus={run.gpus})"
        want = goodput(run.outcomes, run.slo, run.gpus)
        try:
            got = call(impl, outcomes=list(run.outcomes), slo=run.slo, gpus=run.gpus)
        except Counterexample as found:
            raise Counterexample(
                written, None, found.got, found.want, found.why, found.where, run.before()
            ) from None

        def wrong(shown: str, why: str) -> Counterexample:
            return Counterexample(written, None, shown, _shown(want), why, before=run.before())  # noqa: B023

        if got is None:
            raise wrong("None", "nothing was returned; is a `return` missing?")
        pair = isinstance(got, tuple) and len(got) == 2 and all(isinstance(each, Real) for each in got)
        if not pair:
            raise wrong(
                repr(got)[:80], "a pair is wanted: (share in time, requests in time a second and GPU)"
            )
        if not _alike(got, want):
            raise wrong(_shown(got), _guess(run, got, want))
    return cases


def _shown(pair: Sequence[float]) -> str:
    return f"({pair[0]:.4g}, {pair[1]:.4g})"


def _alike(got: Sequence[float], want: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(got, want, strict=True))


def _runs() -> Iterator[_Run]:
    fine = Outcome(0.0, 0.0, 0.25, 1.0, 11, True)
    on_time = Outcome(2.5, 2.5, 3.0, 3.5, 6, True)  # to the limit: TTFT 0.5, TPOT 0.1
    yield _Run((fine, on_time))
    yield _Run((fine, on_time), gpus=2)
    yield _Run((fine._replace(first_token_s=0.75, ended_s=1.0),))  # too late
    yield _Run((fine, Outcome(0.0, 0.0, 0.25, 3.0, 11, True)))  # too slow
    yield _Run((fine, Outcome(1.0, 1.0, 1.25, 1.25, 1, True)))  # a single token
    yield _Run((fine, Outcome(0.0, 0.75, 1.0, 1.5, 11, True)))  # sent late, and then fast
    yield _Run((fine, Outcome(0.5, 0.5, None, None, 0, False)))  # refused
    yield _Run((fine, Outcome(0.5, 0.5, 0.75, 1.0, 4, False)))  # failed in the midst, with good times
    yield _Run((fine, Outcome(0.5, 0.5, 0.75, 4.0, 4, False)))  # and was the last to end
    yield _Run((fine, Outcome(2.0, 2.0, 4.0, 8.0, 11, True)))  # the drain
    yield _Run((fine._replace(scheduled_s=5.0, sent_s=5.0, first_token_s=5.25, ended_s=6.0),))  # the clock
    yield _Run((fine, Outcome(0.0, 0.0, 0.25, 1.25, 11, True)), Slo(0.5, 0.2, 1.0))  # end to end
    yield _Run((fine, Outcome(0.0, 0.0, 0.75, 1.0, 11, True)), Slo(tpot_s=0.1))  # one objective only
    yield _Run((Outcome(0.5, 0.5, None, None, 0, False),))
    rng = random.Random(0)
    for _ in range(120):
        found = []
        for number in range(rng.randint(2, 9)):
            scheduled = 0.5 * number
            sent = scheduled + rng.choice((0, 0, 0.25))
            first = sent + rng.choice((0.125, 0.25, 0.5, 0.75))
            tokens = rng.choice((1, 2, 9))
            ended = first + (tokens - 1) * rng.choice((0.0625, 0.125, 0.25))
            ok = rng.random() < 0.8
            if not ok and rng.random() < 0.5:
                found.append(Outcome(scheduled, sent, None, None, 0, False))
            else:
                found.append(Outcome(scheduled, sent, first, ended, tokens, ok))
        slo = rng.choice((PROMISED, Slo(0.25, 0.125), Slo(0.5), Slo(0.5, 0.25, 1.0)))
        yield _Run(tuple(found), slo, rng.choice((1, 2, 4)))


def _guess(run: _Run, got: Sequence[float], want: Goodput) -> str:
    """Which of the usual mistakes gives exactly that, in words."""
    all_of = run.outcomes
    done = [each for each in all_of if each.ok]
    ends = [each.ended_s for each in all_of if each.ended_s is not None]
    begin, last = min(each.sent_s for each in all_of), max(ends, default=0.0)
    seconds = last - begin

    def judged(
        kept: Callable[[Outcome, float, float, float], bool],
        of: Sequence[Outcome] = all_of,
        span: float = seconds,
    ) -> Judged:
        good = sum(kept(each, *_times(each)) for each in of if each.ended_s is not None)
        return (good / len(all_of), good / span / run.gpus if span else 0.0)

    def right(each: Outcome, ttft: float, tpot: float, e2e: float) -> bool:
        return each.ok and run.slo.met(ttft, tpot, e2e)

    def from_sending(each: Outcome, ttft: float, tpot: float, e2e: float) -> bool:
        late = each.sent_s - each.scheduled_s
        return each.ok and run.slo.met(ttft - late, tpot, e2e - late)

    def per_token(each: Outcome, ttft: float, tpot: float, e2e: float) -> bool:
        mean = tpot * (each.output_tokens - 1) / max(1, each.output_tokens)
        return each.ok and run.slo.met(ttft, mean, e2e)

    def within(slo: Slo) -> Judged:
        return judged(lambda each, *times: each.ok and slo.met(*times))

    good = judged(right)
    count = good[0] * len(all_of)
    any_time, just_below = math.inf, Slo(*(limit * (1 - 1e-9) for limit in run.slo))
    mistakes: list[tuple[str, Judged]] = [
        (
            "each GPU's share is wanted: clusters of different sizes can be compared only by it",
            (good[0], good[1] * run.gpus),
        ),
        (
            "counted from when it was *to be* sent: who waits does not care where the queue is",
            judged(from_sending),
        ),
        (
            "a request that failed got nothing, whatever its first token took",
            judged(lambda each, *times: run.slo.met(*times)),
        ),
        ("kept to the limit is kept: ≤", within(just_below)),
        (
            "the first token has TTFT: TPOT is the time of the *others*, of which there are one fewer",
            judged(per_token),
        ),
        ("all objectives at once: TTFT too", within(run.slo._replace(ttft_s=any_time))),
        (
            "all objectives at once: TPOT too",
            within(Slo(run.slo.ttft_s)),
        ),
        (
            "all objectives at once: the time to the last token (e2e_s) too",
            within(run.slo._replace(e2e_s=any_time)),
        ),
    ]
    if done:
        mistakes.append(
            ("requests that failed are misses: the share is of *all*", (count / len(done), good[1]))
        )
    for why, span in (
        ("until the last request *ended*: the drain belongs to the run", max(e.sent_s for e in all_of) - begin),
        ("until the last request ended, and one that failed took its time too",
         max((e.ended_s or 0.0 for e in done), default=0.0) - begin),
        ("from the first request sent, not from 0", last),
        ("per second: goodput is a rate", 1.0),
    ):  # fmt: skip
        mistakes.append((why, (good[0], count / span / run.gpus if span > 0 else 0.0)))
    mistakes.append(("a share lies between 0 and 1", (100 * good[0], good[1])))
    words = next((words for words, wrong in mistakes if _alike(got, wrong)), "")
    share = math.isclose(got[0], want[0], rel_tol=1e-9)
    return words or (
        f"{count:g} in {seconds:g} s on {run.gpus} GPUs"
        if share
        else f"{count:g} of {len(all_of)} were in time"
    )


def _times(each: Outcome) -> tuple[float, float, float]:
    """TTFT, TPOT and E2EL from the schedule."""
    first, ended = each.first_token_s or 0.0, each.ended_s or 0.0
    gaps = each.output_tokens - 1
    return first - each.scheduled_s, (ended - first) / gaps if gaps > 0 else 0.0, ended - each.scheduled_s


EXERCISES = (
    Exercise(
        name="bench.arrivals",
        notebook="09",
        reference=arrival_times,
        check=check_arrivals,
        hints=(
            "First gaps, then times: each request comes a gap after the one before it. `rng` is a `random.Random` and "
            "draws from many distributions. What is left to do so that the last comes at exactly count / rate?",
            "`rng.gammavariate(shape, scale)` has mean shape · scale; with shape = burstiness the mean 1 / rate needs "
            "which scale? Then `itertools.accumulate`, and multiply all times by one number. An infinite rate: all 0.",
            "`gaps = [rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)]`; "
            "`times = list(itertools.accumulate(gaps))`; `return [t * count / rate / times[-1] for t in times]`. "
            "Before all that: `if rate == math.inf: return [0.0] * count`.",
        ),
    ),
    Exercise(
        name="bench.goodput",
        notebook="09",
        reference=goodput,
        check=check_goodput,
        hints=(
            "Count the good ones, then divide twice: by how many requests there were, and by seconds and GPUs. Which "
            "requests, which seconds? Play the six of the concept.",
            "Good: `ok`, and `slo.met(ttft, tpot, e2e)`. TTFT and E2E count from `scheduled_s`; TPOT is the time from "
            "first token to end over the tokens behind the first, 0 for a single one. The run lasts from the first "
            "`sent_s` to the last `ended_s` that is not None, also of those that failed.",
            "For each `o` with `o.ok`: `gaps = o.output_tokens - 1`; `tpot = (o.ended_s - o.first_token_s) / gaps` "
            "(0.0 without gaps); `good += slo.met(o.first_token_s - o.scheduled_s, tpot, o.ended_s - o.scheduled_s)`. "
            "`ends = [o.ended_s for o in outcomes if o.ended_s is not None]`; without any `return 0.0, 0.0`; "
            "`return good / len(outcomes), good / (max(ends) - min(o.sent_s for o in outcomes)) / gpus`.",
        ),
    ),
)
