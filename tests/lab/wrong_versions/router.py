"""Versions of the exercises on where a request should run."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtri, stdtrit
from scipy.stats import t as student

from nanopd_lab.core import Route
from nanopd_lab.router.predictor.conjugate import Evidence, NormalInverseGamma
from tests.lab.wrong_versions.base import Version

# ---------------------------------------------------------------------- time to first token


def ttft_without_the_queue(queued_tokens, prompt_tokens, outputs, budget, step_s):
    left, seconds = prompt_tokens, 0.0
    while left > 0:
        chunk = min(left, budget - outputs)
        seconds += step_s(chunk, outputs)
        left -= chunk
    return seconds


def ttft_whole_budget(queued_tokens, prompt_tokens, outputs, budget, step_s):
    left, seconds = queued_tokens + prompt_tokens, 0.0
    while left > 0:
        chunk = min(left, budget)
        seconds += step_s(chunk, outputs)
        left -= chunk
    return seconds


def ttft_no_outputs_beside(queued_tokens, prompt_tokens, outputs, budget, step_s):
    left, seconds = queued_tokens + prompt_tokens, 0.0
    while left > 0:
        chunk = min(left, budget - outputs)
        seconds += step_s(chunk, 0)
        left -= chunk
    return seconds


def ttft_full_steps(queued_tokens, prompt_tokens, outputs, budget, step_s):
    room = budget - outputs
    return -(-(queued_tokens + prompt_tokens) // room) * step_s(room, outputs)


def ttft_one_step(queued_tokens, prompt_tokens, outputs, budget, step_s):
    return step_s(queued_tokens + prompt_tokens, outputs)


def ttft_rounds_down(queued_tokens, prompt_tokens, outputs, budget, step_s):
    room = budget - outputs
    return (queued_tokens + prompt_tokens) // room * step_s(room, outputs)


def ttft_queue_by_itself(queued_tokens, prompt_tokens, outputs, budget, step_s):
    seconds = 0.0
    for left in (queued_tokens, prompt_tokens):
        while left > 0:
            chunk = min(left, budget - outputs)
            seconds += step_s(chunk, outputs)
            left -= chunk
    return seconds


def ttft_milliseconds(queued_tokens, prompt_tokens, outputs, budget, step_s):
    return 1e3 * ttft_by_division(queued_tokens, prompt_tokens, outputs, budget, step_s)


def ttft_one_step_too_many(queued_tokens, prompt_tokens, outputs, budget, step_s):
    left, seconds = queued_tokens + prompt_tokens, 0.0
    while left >= 0:
        chunk = min(left, budget - outputs)
        seconds += step_s(chunk, outputs)
        left -= budget - outputs
    return seconds


def ttft_forgets_to_return(queued_tokens, prompt_tokens, outputs, budget, step_s):
    step_s(queued_tokens + prompt_tokens, outputs)


def ttft_never_ends(queued_tokens, prompt_tokens, outputs, budget, step_s):
    left, seconds = queued_tokens + prompt_tokens, 0.0
    while left > 0:
        seconds += step_s(min(left, budget - outputs), outputs)
    return seconds


def ttft_by_division(queued_tokens, prompt_tokens, outputs, budget, step_s):
    full, rest = divmod(queued_tokens + prompt_tokens, budget - outputs)
    seconds = full * step_s(budget - outputs, outputs)
    return seconds + (step_s(rest, outputs) if rest else 0.0)


def ttft_with_range(queued_tokens, prompt_tokens, outputs, budget, step_s):
    tokens, room = queued_tokens + prompt_tokens, budget - outputs
    return sum(step_s(min(room, tokens - begin), outputs) for begin in range(0, tokens, room))


# ---------------------------------------------------------------------- a rule


def _pairs(workers):
    return [(s, t) for s in workers if s.role.prefills for t in reversed(workers) if t.role.decodes]


def rule_always_the_first(job, workers, estimate, slo):
    return Route(workers[0].name, workers[0].name) if workers else None


def rule_any_pair(job, workers, estimate, slo):
    pairs = [(s, t) for s in workers for t in workers]
    if not pairs:
        return None
    s, t = min(pairs, key=lambda p: sum(estimate(*p).missed(slo).values()))
    return Route(s.name, t.name)


def rule_sorts_by_name(job, workers, estimate, slo):
    if not any(w.role.prefills for w in workers) or not any(w.role.decodes for w in workers):
        return None
    names = sorted(w.name for w in reversed(workers))
    return Route(names[-1], names[0])


def rule_soonest_token(job, workers, estimate, slo):
    pairs = [(s, t) for s in workers if s.role.prefills for t in workers if t.role.decodes]
    if not pairs:
        return None
    s, t = min(pairs, key=lambda p: estimate(*p).ttft_s)
    return Route(s.name, t.name)


def rule_only_its_own(job, workers, estimate, slo):
    pairs = [(s, t) for s in workers if s.role.prefills for t in workers if t.role.decodes]
    pairs = [p for p in pairs if not job.avoid & {p[0].name, p[1].name}] or pairs
    if not pairs:
        return None
    s, t = min(pairs, key=lambda p: (estimate(*p).ttft_s > slo.ttft_s) + (estimate(*p).tpot_s > slo.tpot_s))
    return Route(s.name, t.name)


def rule_forgets_who_failed(job, workers, estimate, slo):
    pairs = [(s, t) for s in workers if s.role.prefills for t in workers if t.role.decodes]
    if not pairs:
        return None
    s, t = min(pairs, key=lambda p: sum(estimate(*p).missed(slo).values()))
    return Route(s.name, t.name)


def rule_never_again(job, workers, estimate, slo):
    workers = [w for w in workers if w.name not in job.avoid]
    pairs = [(s, t) for s in workers if s.role.prefills for t in workers if t.role.decodes]
    if not pairs:
        return None
    s, t = min(pairs, key=lambda p: sum(estimate(*p).missed(slo).values()))
    return Route(s.name, t.name)


def rule_one_worker(job, workers, estimate, slo):
    both = [w for w in workers if w.role.prefills and w.role.decodes]
    if not both:
        return None
    w = min(both, key=lambda w: sum(estimate(w, w).missed(slo).values()))
    return Route(w.name, w.name)


def rule_two_workers(job, workers, estimate, slo):
    pairs = [(s, t) for s in workers if s.role.prefills for t in workers if t.role.decodes and t is not s]
    if not pairs:
        return None
    s, t = min(pairs, key=lambda p: sum(estimate(*p).missed(slo).values()))
    return Route(s.name, t.name)


def rule_waits_for_a_good_one(job, workers, estimate, slo):
    for s in workers:
        for t in workers:
            if s.role.prefills and t.role.decodes and not sum(estimate(s, t).missed(slo).values()):
                return Route(s.name, t.name)
    return None


def rule_counts_kinds(job, workers, estimate, slo):
    pairs = [(s, t) for s in workers if s.role.prefills for t in workers if t.role.decodes]
    pairs = [p for p in pairs if not job.avoid & {p[0].name, p[1].name}] or pairs
    if not pairs:
        return None
    s, t = min(pairs, key=lambda p: sum(n > 0 for n in estimate(*p).missed(slo).values()))
    return Route(s.name, t.name)


def rule_blames_for_all(job, workers, estimate, slo):
    def missed(pair):
        each = estimate(*pair)
        others = each.outputs if each.after_s > slo.tpot_s else 0
        return (each.ttft_s > slo.ttft_s) + (each.tpot_s > slo.tpot_s) + others

    pairs = [(s, t) for s in workers if s.role.prefills for t in workers if t.role.decodes]
    if not pairs:
        return None
    s, t = min(pairs, key=missed)
    return Route(s.name, t.name)


def rule_views(job, workers, estimate, slo):
    pairs = [(s, t) for s in workers if s.role.prefills for t in workers if t.role.decodes]
    if not pairs:
        return None
    return min(pairs, key=lambda p: sum(estimate(*p).missed(slo).values()))


def rule_pops(job, workers, estimate, slo):
    for w in list(workers):
        if w.name in job.avoid and len(workers) > 1:
            workers.remove(w)
    return rule_forgets_who_failed(job, workers, estimate, slo)


def rule_in_one_min(job, workers, estimate, slo):
    pairs = [(s, t) for s in workers if s.role.prefills for t in reversed(workers) if t.role.decodes]
    if not pairs:
        return None

    def key(pair):
        s, t = pair
        each = estimate(s, t)
        over = max(0, each.ttft_s - slo.ttft_s) / slo.ttft_s + max(0, each.tpot_s - slo.tpot_s) / slo.tpot_s
        return bool(job.avoid & {s.name, t.name}), sum(each.missed(slo).values()), over

    s, t = min(pairs, key=key)
    return Route(s.name, t.name)


def rule_with_seconds(job, workers, estimate, slo):
    found = []
    for s in workers:
        for t in workers:
            if s.role.prefills and t.role.decodes:
                each = estimate(s, t)
                others = each.outputs if each.before_s <= slo.tpot_s < each.after_s else 0
                missed = (each.ttft_s > slo.ttft_s) + (each.tpot_s > slo.tpot_s) + others
                failed = s.name in job.avoid or t.name in job.avoid
                found.append((failed, missed, each.ttft_s + 100 * each.tpot_s, s.name, t.name))
    return Route(*min(found)[3:]) if found else None


# ---------------------------------------------------------------------- lengths


class PlainLengths:
    def __init__(self, belief):
        self.belief = belief

    def observe(self, tokens, censored):
        x, spread = math.log(tokens), 0.0
        if censored:
            x, spread = self.belief.predictive.moments_beyond(x)
        mean, strength, variance, df = self.belief
        new = mean + (x - mean) / (strength + 1)
        squares = df * variance + (x - mean) * (x - new) + spread * strength / (strength + 1)
        self.belief = NormalInverseGamma(new, strength + 1, squares / (df + 1), df + 1)

    def quantile(self, p):
        return math.exp(self.belief.predictive.quantile(p))


class ByEvidence:
    """With the package's batch update, and scipy's distribution."""

    def __init__(self, belief):
        self.belief = belief

    def observe(self, tokens, censored):
        value, spread = math.log(tokens), 0.0
        if censored:
            value, spread = self.belief.predictive.moments_beyond(value)
        seen = Evidence(1.0, value, 1.0, spread * self.belief.strength / (self.belief.strength + 1))
        self.belief = self.belief.given(seen)

    def quantile(self, p):
        m, k, v, df = self.belief
        return float(np.exp(student(df, loc=m, scale=math.sqrt(v + v / k)).ppf(p)))


class _Given:
    def __init__(self, belief):
        self.belief = belief

    def observe(self, tokens, censored):
        PlainLengths.observe(self, tokens, censored)

    def quantile(self, p):
        return PlainLengths.quantile(self, p)


class IgnoresCut:
    def __init__(self, belief):
        self.belief = belief

    def observe(self, tokens, censored):
        if censored:
            return
        x = math.log(tokens)
        mean, strength, variance, df = self.belief
        squares = df * variance + (x - mean) ** 2 * strength / (strength + 1)
        self.belief = NormalInverseGamma(
            mean + (x - mean) / (strength + 1), strength + 1, squares / (df + 1), df + 1
        )

    def quantile(self, p):
        return math.exp(self.belief.predictive.quantile(p))


class CutCountsAsEnded(_Given):
    def observe(self, tokens, censored):
        PlainLengths.observe(self, tokens, False)


class CutWithoutSpread(_Given):
    def observe(self, tokens, censored):
        x = self.belief.predictive.moments_beyond(math.log(tokens))[0] if censored else math.log(tokens)
        PlainLengths.observe(self, math.exp(x), False)


class CutWithWholeSpread(_Given):
    def observe(self, tokens, censored):
        x, spread = math.log(tokens), 0.0
        if censored:
            x, spread = self.belief.predictive.moments_beyond(x)
        mean, strength, variance, df = self.belief
        squares = df * variance + (x - mean) ** 2 * strength / (strength + 1) + spread
        self.belief = NormalInverseGamma(
            mean + (x - mean) / (strength + 1), strength + 1, squares / (df + 1), df + 1
        )


class OfTokens(_Given):
    def observe(self, tokens, censored):
        mean, strength, variance, df = self.belief
        squares = df * variance + (tokens - mean) ** 2 * strength / (strength + 1)
        self.belief = NormalInverseGamma(
            mean + (tokens - mean) / (strength + 1), strength + 1, squares / (df + 1), df + 1
        )


class NoShare(_Given):
    def observe(self, tokens, censored):
        x = math.log(tokens)
        mean, strength, variance, df = self.belief
        squares = df * variance + (x - mean) ** 2
        self.belief = NormalInverseGamma(
            mean + (x - mean) / (strength + 1), strength + 1, squares / (df + 1), df + 1
        )


class OldDf(_Given):
    def observe(self, tokens, censored):
        x = math.log(tokens)
        mean, strength, variance, df = self.belief
        squares = df * variance + (x - mean) ** 2 * strength / (strength + 1)
        self.belief = NormalInverseGamma(
            mean + (x - mean) / (strength + 1), strength + 1, squares / df, df + 1
        )


class OnlyTheMean(_Given):
    def observe(self, tokens, censored):
        mean, strength, variance, df = self.belief
        new = mean + (math.log(tokens) - mean) / (strength + 1)
        self.belief = NormalInverseGamma(new, strength + 1, variance, df + 1)


class StrengthStays(_Given):
    def observe(self, tokens, censored):
        before = self.belief.strength
        PlainLengths.observe(self, tokens, censored)
        self.belief = self.belief._replace(strength=before)


class ATuple(_Given):
    def observe(self, tokens, censored):
        PlainLengths.observe(self, tokens, censored)
        self.belief = tuple(self.belief)


class InLogs(_Given):
    def quantile(self, p):
        return self.belief.predictive.quantile(p)


class OfANormal(_Given):
    def quantile(self, p):
        t = self.belief.predictive
        return math.exp(t.mean + t.scale * ndtri(p))


class TheOtherTail(_Given):
    def quantile(self, p):
        return PlainLengths.quantile(self, 1 - p)


class OfTheMean(_Given):
    def quantile(self, p):
        mean, strength, variance, df = self.belief
        return math.exp(mean + math.sqrt(variance / strength) * stdtrit(df, p))


class MeanIsCertain(_Given):
    def quantile(self, p):
        mean, _, variance, df = self.belief
        return math.exp(mean + math.sqrt(variance) * stdtrit(df, p))


class ReturnsNothing(_Given):
    def quantile(self, p):
        math.exp(self.belief.predictive.quantile(p))


WRONG: dict[str, list[tuple[Version, str]]] = {
    "router.ttft": [
        (ttft_without_the_queue, "the queue's tokens come first"),
        (ttft_whole_budget, "prompts get the rest"),
        (ttft_no_outputs_beside, "the outputs are in every step too"),
        (ttft_full_steps, "computes only what is left"),
        (ttft_one_step, "a long prompt takes several"),
        (ttft_rounds_down, "though it is not full"),
        (ttft_queue_by_itself, "goes on with the prompt at once"),
        (ttft_milliseconds, "seconds, not milliseconds"),
        (ttft_one_step_too_many, "in steps with room for"),
        (ttft_forgets_to_return, "is a `return` missing?"),
        (ttft_never_ends, "is there a loop that never ends?"),
    ],
    "router.rule": [
        (rule_soonest_token, "breaks 5 (others tpot)"),
        (rule_always_the_first, "it has to wait"),
        (rule_any_pair, "it has to wait"),
        (rule_sorts_by_name, "only decodes: it cannot be the source"),
        (rule_only_its_own, "(others tpot)"),
        (rule_forgets_who_failed, "failed this request before"),
        (rule_never_again, "waiting gains nothing"),
        (rule_one_worker, "waiting gains nothing"),
        (rule_two_workers, "waiting gains nothing"),
        (rule_waits_for_a_good_one, "waiting gains nothing"),
        (rule_counts_kinds, "breaks 5 (others tpot)"),
        (rule_blames_for_all, "breaks none"),
        (rule_views, "a Route holds names of workers"),
        (rule_pops, "workers must stay as they are"),
    ],
    "router.lengths": [
        (IgnoresCut, "says something"),
        (CutCountsAsEnded, "would have gone on"),
        (CutWithoutSpread, "their variance goes into the squares"),
        (CutWithWholeSpread, "counts as a gap's square does"),
        (OfTokens, "of the *logarithm*"),
        (NoShare, "the mean was not certain"),
        (OldDf, "with the new df"),
        (OnlyTheMean, "the variance is learnt too"),
        (StrengthStays, "strength grows by 1"),
        (ATuple, "which others read"),
        (InLogs, "exp gives tokens"),
        (OfANormal, "its tails are longer"),
        (TheOtherTail, "not 1 - p"),
        (OfTheMean, "its own variance"),
        (MeanIsCertain, "has both"),
        (ReturnsNothing, "is a `return` missing?"),
    ],
}

RIGHT: dict[str, list[Version]] = {
    "router.ttft": [ttft_by_division, ttft_with_range],
    "router.rule": [rule_in_one_min, rule_with_seconds],
    "router.lengths": [PlainLengths, ByEvidence],
}
