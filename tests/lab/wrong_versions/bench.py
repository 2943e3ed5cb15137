"""Versions of the exercises on measuring a service."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np

from tests.lab.wrong_versions.base import Version

# ---------------------------------------------------------------------- arrivals


def _stretched(gaps, count, rate):
    times = list(itertools.accumulate(gaps))
    return [each * count / rate / times[-1] for each in times]


def arrivals_by_hand(count, rate, burstiness, rng):
    if rate == math.inf:
        return [0.0] * count
    now, times = 0.0, []
    for _ in range(count):
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    return [time / now * count / rate for time in times]


def arrivals_any_scale(count, rate, burstiness, rng):
    """The stretch makes up for the scale."""
    if math.isinf(rate):
        return [0.0 for _ in range(count)]
    return _stretched([rng.gammavariate(burstiness, 1.0) for _ in range(count)], count, rate)


def arrivals_with_numpy(count, rate, burstiness, rng):
    gaps = np.random.default_rng(rng.getrandbits(64)).gamma(burstiness, 1.0, size=count)
    times = np.cumsum(gaps)
    return np.zeros(count) if rate == math.inf else times / times[-1] * count / rate


def arrivals_not_stretched(count, rate, burstiness, rng):
    now, times = 0.0, []
    for _ in range(count):
        now += 0.0 if rate == math.inf else rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    return times


def arrivals_gaps(count, rate, burstiness, rng):
    return [
        0.0 if rate == math.inf else rng.gammavariate(burstiness, 1 / rate / burstiness) for _ in range(count)
    ]


def arrivals_even(count, rate, burstiness, rng):
    return [(number + 1) / rate for number in range(count)]


def arrivals_even_with_a_jitter(count, rate, burstiness, rng):
    if rate == math.inf:
        return [0.0] * count
    return _stretched([rng.uniform(0.95, 1.05) for _ in range(count)], count, rate)


def arrivals_always_poisson(count, rate, burstiness, rng):
    if rate == math.inf:
        return [0.0] * count
    return _stretched([rng.expovariate(rate) for _ in range(count)], count, rate)


def arrivals_shape_upside_down(count, rate, burstiness, rng):
    if rate == math.inf:
        return [0.0] * count
    return _stretched(
        [rng.gammavariate(1 / burstiness, burstiness / rate) for _ in range(count)], count, rate
    )


def arrivals_shape_squared(count, rate, burstiness, rng):
    if rate == math.inf:
        return [0.0] * count
    return _stretched([rng.gammavariate(burstiness**2, 1.0) for _ in range(count)], count, rate)


def arrivals_from_zero(count, rate, burstiness, rng):
    times = arrivals_by_hand(count, rate, burstiness, rng)
    return [time - times[0] for time in times]


def arrivals_to_the_gap_before(count, rate, burstiness, rng):
    times = arrivals_by_hand(count, rate, burstiness, rng)
    return [time * max(1, count - 1) / count for time in times]


def arrivals_in_ms(count, rate, burstiness, rng):
    return [1000 * time for time in arrivals_by_hand(count, rate, burstiness, rng)]


def arrivals_of_their_own(count, rate, burstiness, rng):
    return arrivals_by_hand(count, rate, burstiness, random.Random())


def arrivals_always_the_same(count, rate, burstiness, rng):
    return arrivals_by_hand(count, rate, burstiness, random.Random(0))


def arrivals_log_normal(count, rate, burstiness, rng):
    if rate == math.inf:
        return [0.0] * count
    sigma = math.sqrt(math.log(1 + 1 / burstiness))
    return _stretched([rng.lognormvariate(-sigma * sigma / 2, sigma) for _ in range(count)], count, rate)


def arrivals_sorted_gaps(count, rate, burstiness, rng):
    if rate == math.inf:
        return [0.0] * count
    gaps = sorted(rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count))
    return _stretched(gaps, count, rate)


def arrivals_infinite_rate_forgotten(count, rate, burstiness, rng):
    return _stretched(
        [rng.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)], count, rate
    )


def arrivals_one_too_many(count, rate, burstiness, rng):
    return [0.0, *arrivals_by_hand(count, rate, burstiness, rng)]


def arrivals_forgets_to_return(count, rate, burstiness, rng):
    arrivals_by_hand(count, rate, burstiness, rng)


# ---------------------------------------------------------------------- goodput


def _tpot(each):
    return (each.ended_s - each.first_token_s) / max(1, each.output_tokens - 1)


def _seconds(outcomes):
    return max((o.ended_s for o in outcomes if o.ended_s is not None), default=0) - min(
        o.sent_s for o in outcomes
    )


def goodput_by_hand(outcomes, slo, gpus):
    good = 0
    for each in outcomes:
        if each.ok:
            tpot = (each.ended_s - each.first_token_s) / max(1, each.output_tokens - 1)
            good += slo.met(each.first_token_s - each.scheduled_s, tpot, each.ended_s - each.scheduled_s)
    ended = [each.ended_s for each in outcomes if each.ended_s is not None]
    if not ended:
        return 0.0, 0.0
    return good / len(outcomes), good / (max(ended) - min(each.sent_s for each in outcomes)) / gpus


def goodput_with_numpy(outcomes, slo, gpus):
    columns = np.array(
        [[np.nan if v is None else float(v) for v in each] for each in outcomes], dtype=np.float64
    ).T
    scheduled, sent, first, ended, tokens, ok = columns
    if np.isnan(ended).all():
        return 0.0, 0.0
    tpot = np.where(tokens > 1, (ended - first) / np.maximum(tokens - 1, 1), 0.0)
    limits = zip((first - scheduled, tpot, ended - scheduled), slo, strict=True)
    good = float((np.all([values <= limit for values, limit in limits], axis=0) & (ok > 0)).sum())
    return good / len(outcomes), good / float(np.nanmax(ended) - sent.min()) / gpus


def goodput_of_all_gpus(outcomes, slo, gpus):
    return goodput_by_hand(outcomes, slo, 1)


def goodput_from_sending(outcomes, slo, gpus):
    good = 0
    for each in outcomes:
        if each.ok:
            tpot = (each.ended_s - each.first_token_s) / max(1, each.output_tokens - 1)
            good += slo.met(each.first_token_s - each.sent_s, tpot, each.ended_s - each.sent_s)
    ended = [each.ended_s for each in outcomes if each.ended_s is not None]
    if not ended:
        return 0.0, 0.0
    return good / len(outcomes), good / (max(ended) - min(each.sent_s for each in outcomes)) / gpus


def goodput_of_the_completed(outcomes, slo, gpus):
    share, rate = goodput_by_hand(outcomes, slo, gpus)
    done = sum(each.ok for each in outcomes)
    return (share * len(outcomes) / done if done else 0.0), rate


def goodput_counts_failed(outcomes, slo, gpus):
    return goodput_by_hand([e._replace(ok=e.ended_s is not None) for e in outcomes], slo, gpus)


def goodput_without_the_drain(outcomes, slo, gpus):
    share, _ = goodput_by_hand(outcomes, slo, gpus)
    seconds = max(e.sent_s for e in outcomes) - min(e.sent_s for e in outcomes)
    return share, (share * len(outcomes) / seconds / gpus if seconds else 0.0)


def goodput_until_the_last_completed(outcomes, slo, gpus):
    share, _ = goodput_by_hand(outcomes, slo, gpus)
    seconds = max((e.ended_s for e in outcomes if e.ok), default=0) - min(e.sent_s for e in outcomes)
    return share, (share * len(outcomes) / seconds / gpus if seconds > 0 else 0.0)


def goodput_since_the_clock_began(outcomes, slo, gpus):
    share, _ = goodput_by_hand(outcomes, slo, gpus)
    seconds = max((e.ended_s for e in outcomes if e.ended_s is not None), default=0)
    return share, (share * len(outcomes) / seconds / gpus if seconds else 0.0)


def goodput_strictly_below(outcomes, slo, gpus):
    return goodput_by_hand(outcomes, type(slo)(*(limit * (1 - 1e-9) for limit in slo)), gpus)


def goodput_all_tokens(outcomes, slo, gpus):
    return goodput_by_hand([e._replace(output_tokens=e.output_tokens + 1) for e in outcomes], slo, gpus)


def goodput_only_ttft(outcomes, slo, gpus):
    return goodput_by_hand(outcomes, slo._replace(tpot_s=math.inf, e2e_s=math.inf), gpus)


def goodput_only_tpot(outcomes, slo, gpus):
    return goodput_by_hand(outcomes, slo._replace(ttft_s=math.inf), gpus)


def goodput_not_end_to_end(outcomes, slo, gpus):
    return goodput_by_hand(outcomes, slo._replace(e2e_s=math.inf), gpus)


def goodput_divides_by_no_gaps(outcomes, slo, gpus):
    good = 0
    for each in outcomes:
        if each.ok:
            tpot = (each.ended_s - each.first_token_s) / (each.output_tokens - 1)
            good += slo.met(each.first_token_s - each.scheduled_s, tpot, each.ended_s - each.scheduled_s)
    return good / len(outcomes), good / _seconds(outcomes) / gpus


def goodput_counts_them(outcomes, slo, gpus):
    share, _ = goodput_by_hand(outcomes, slo, gpus)
    return share, share * len(outcomes) / gpus


def goodput_in_percent(outcomes, slo, gpus):
    share, rate = goodput_by_hand(outcomes, slo, gpus)
    return 100 * share, rate


def goodput_only_the_rate(outcomes, slo, gpus):
    return goodput_by_hand(outcomes, slo, gpus)[1]


def goodput_subtracts_none(outcomes, slo, gpus):
    good = sum(
        slo.met(e.first_token_s - e.scheduled_s, _tpot(e), e.ended_s - e.scheduled_s) for e in outcomes
    )
    return good / len(outcomes), good / _seconds(outcomes) / gpus


def goodput_forgets_to_return(outcomes, slo, gpus):
    goodput_by_hand(outcomes, slo, gpus)


WRONG: dict[str, list[tuple[Version, str]]] = {
    "bench.arrivals": [
        (arrivals_not_stretched, "stretch all times alike"),
        (arrivals_gaps, "times, not gaps"),
        (arrivals_even, "draw from `rng`"),
        (arrivals_even_with_a_jitter, "all gaps are alike"),
        (arrivals_always_poisson, "these gaps don't know it"),
        (arrivals_shape_upside_down, "the higher the burstiness, the more even"),
        (arrivals_shape_squared, "the shape is burstiness itself"),
        (arrivals_from_zero, "after a gap too"),
        (arrivals_to_the_gap_before, "so it comes at count / rate"),
        (arrivals_in_ms, "seconds, not milliseconds"),
        (arrivals_of_their_own, "others from the same seed"),
        (arrivals_always_the_same, "the same from another seed"),
        (arrivals_log_normal, "are not as frequent"),
        (arrivals_sorted_gaps, "each gap is drawn by itself"),
        (arrivals_infinite_rate_forgotten, "Error"),
        (arrivals_one_too_many, "one time for each request"),
        (arrivals_forgets_to_return, "is a `return` missing?"),
    ],
    "bench.goodput": [
        (goodput_from_sending, "when it was *to be* sent"),
        (goodput_of_all_gpus, "each GPU's share"),
        (goodput_of_the_completed, "requests that failed are misses"),
        (goodput_counts_failed, "a request that failed got nothing"),
        (goodput_without_the_drain, "the drain belongs to the run"),
        (goodput_until_the_last_completed, "one that failed took its time too"),
        (goodput_since_the_clock_began, "not from 0"),
        (goodput_strictly_below, "kept to the limit is kept"),
        (goodput_all_tokens, "of which there are one fewer"),
        (goodput_only_ttft, "all objectives at once: TPOT too"),
        (goodput_only_tpot, "all objectives at once: TTFT too"),
        (goodput_not_end_to_end, "the last token (e2e_s) too"),
        (goodput_divides_by_no_gaps, "ZeroDivisionError"),
        (goodput_counts_them, "goodput is a rate"),
        (goodput_in_percent, "between 0 and 1"),
        (goodput_only_the_rate, "a pair is wanted"),
        (goodput_subtracts_none, "TypeError"),
        (goodput_forgets_to_return, "is a `return` missing?"),
    ],
}

RIGHT: dict[str, list[Version]] = {
    "bench.arrivals": [arrivals_by_hand, arrivals_any_scale, arrivals_with_numpy],
    "bench.goodput": [goodput_by_hand, goodput_with_numpy],
}
