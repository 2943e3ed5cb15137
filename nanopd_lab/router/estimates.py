"""What one more request would meet and do at a worker, from the worker's view: for the adaptive policy.

A request at workers s (prefill) and t (decode) costs, in expected misses of objectives:

    ttft_misses         its own: what s has queued, the step under way, its prompt in chunks beside s's decodes
    tpot_misses         its own: t's pace with one more output, slowed by the prompts that t gets, and the handover
    misses_by_prompt    of the outputs that s decodes, each of which waits while the prompt is computed
    misses_by_output    of the outputs that t decodes, each of which is slower with one more beside it
    misses_by_link      what waits for s's link already, if the KV has to move

and, to break ties, the seconds that everybody waits longer. All but the handover depends on s alone or on t alone. What
does not depend on the request is worked out when a view is new (`Terms`); the rest is a few products a worker.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from math import exp, sqrt
from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.router.policy import Role, WorkerView
from nanopd_lab.router.replay import JOINING_STEPS

if TYPE_CHECKING:
    from nanopd_lab.router.slo import Slo
    from nanopd_lab.router.step_costs import StepCosts

SECONDS_WORTH = 0.02  # misses that count as much as the time that a request takes alone
# How far estimates are off, as a share of the objective; the second of plans, whose outputs nobody has seen yet.
TTFT_DOUBT, TPOT_DOUBT = 0.15, 0.12
# The doubt of one worker's time per token: what is always off, what chance adds (see `tpot_doubt`; a fitted factor),
# and at most. Where outputs are long a wide doubt makes a sacrifice look cheap: one worker that is given all prompts.
STEADY_DOUBT, BY_CHANCE, MOST_DOUBT = 0.05, 2.0, 0.15
# Of the prompts that are queued: so many come while they are computed, and share a step; or the share of the worker's
# time that prompts have taken lately, if that is more. The second where no outputs run; both are right on average in
# simulations.
SHARED, SHARED_ALONE = 0.25, 0.125
FULL = 0.9  # of the KV blocks: outputs that run need room to grow
MEMORY_S = 4.0  # half of what prompts took on a worker is forgotten
PREFILL, DECODE, MIXED = Role.PREFILL, Role.DECODE, Role.MIXED
FRESH_S = 0.5  # after so long a view is looked at again though nothing has happened there


class Terms(NamedTuple):
    """What a view says of one more request. What its role does not allow is not worked out, and 0.

    until: when it is to be looked at again (s)
    active: outputs that it decodes now; room: tokens of a prompt that a step takes beside them
    exposed: outputs that it will decode when a prompt that comes now is computed
    free_at: when it will have computed the prompts that it has (s)
    wait_s: from then on until a step takes in who comes, and what others bring into the prompt's last step
    pace_s: a decode step now
    prompt_harm: misses of others for each second that a prompt takes beside them
    tpot_s, tpot_misses: the request's own, without a handover
    handover_slope: misses for each second a token more
    slack_s: that a token may take longer, over all of an output, until it misses
    joining_s: that an output from elsewhere waits for steps here
    output_harm: misses of others by one more output
    spread_s: what one token more costs, all together
    link_s: that waits for the worker's link
    full: with one more output, its KV blocks would be, about
    """

    view: WorkerView
    until: float
    role: Role
    active: int
    exposed: int
    room: int
    free_at: float
    wait_s: float
    pace_s: float
    prompt_harm: float
    tpot_s: float
    tpot_misses: float
    handover_slope: float
    slack_s: float
    joining_s: float
    output_harm: float
    spread_s: float
    link_s: float
    full: bool


class Typical(NamedTuple):
    """Of the requests of late: tokens of a prompt and of an output, seconds until the first token."""

    prompt_tokens: int
    output_tokens: float
    delay_s: float


class Ask(NamedTuple):
    """One request.

    alone_s, pull_s: its prompt, and all its KV over an idle link
    moved_s: what of that can be seen
    gaps: tokens of its output behind the first; of_many: of as many outputs as likely as each other, in order
    weight: what a second counts in misses
    """

    tokens: int
    alone_s: float
    pull_s: float
    moved_s: float
    gaps: float
    output: float
    waited_s: float
    weight: float
    of_many: tuple[float, ...]


def terms_of(
    view: WorkerView, costs: StepCosts, slo: Slo, typical: Typical, share: float, token_s: float, now: float
) -> Terms:
    """Work a view out.

    Args:
        share: of the worker's time that prompts have taken lately, beside outputs
        token_s: that the link takes for the KV of a token
    """
    (
        _, role, prefilling, prefill_tokens, decoding, _, _, decode_tokens, arriving, arriving_tokens,
        _, leaving_tokens, since, num_blocks, block_size, _,
    ) = view  # fmt: skip
    prompt, output, delay_s = typical
    slo_s, budget, batches, by_context, host_s = (
        slo.tpot_s, costs.budget, costs.batches, costs.context_s, costs.host_s,
    )  # fmt: skip
    promised, doubt, beside = slo_s < math.inf, STEADY_DOUBT, costs.beside_all(prompt)
    if share > 0.0:  # no decode worker's
        doubt = tpot_doubt(share, beside[-(-(decoding or 1) // 8)], output, slo_s)
    unmissed = 1 / doubt  # doubts between no time per token and the objective
    by_s = 1 / (doubt * slo_s)
    produced = output / 2
    exposed = active = decoding - arriving
    free_at, wait_s, pace_s, room = now, 0.0, 0.0, budget - active if active < budget else 1
    if active:
        pace_s = batches[active] + by_context * (decode_tokens - arriving_tokens + active * produced)
        if pace_s < host_s:
            pace_s = host_s
        wait_s = costs.wait_steps * pace_s
    if prefilling:
        mean = max(1, prefill_tokens // prefilling)
        if active:
            work_s = costs.queued_beside(mean, prefilling, active) + prefill_tokens / room * pace_s
        else:
            work_s = costs.queued(mean, prefilling)
        # A step is planned ahead: who comes until then shares the prompt's own, if it has room for more than one.
        free_at, wait_s = since + work_s, 0.0
        if free_at < now:  # it is stuck, for want of room perhaps: as long again
            free_at = 2 * now - free_at
        if active or 2 * mean <= budget:
            least = SHARED if active else SHARED_ALONE
            shared_s = (share if share > least else least) * work_s
            wait_s = (costs.wait_steps - 0.5) * pace_s + (
                shared_s if shared_s < costs.rest_s else costs.rest_s
            )
        if decoding and role is not DECODE:
            left_s, each_s = max(1e-9, free_at - now), output * (pace_s or costs.decode(1, 0))
            staying = active * max(0.0, 1.0 - left_s / each_s)
            # Of those that come before, the last one has hardly begun then.
            coming = max(1.0, arriving * min(1.0, each_s / left_s)) if arriving else 0.0
            exposed = round(staying + coming)
    each = decode_tokens / decoding + produced if decoding else 0.0
    room_tokens = num_blocks * block_size
    if room_tokens and active and role is not DECODE:
        excess = decode_tokens + active * produced + prefill_tokens + leaving_tokens + prompt - room_tokens
        if excess > 0.0:  # the prompt waits until others have ended
            wait_s += excess / (active * each) * output * pace_s
    free = 1.0 - share
    full = False
    tpot_s = own = handover_slope = joining_s = output_harm = spread_s = prompt_harm = 0.0
    slack_s = math.inf
    if role is not PREFILL:
        outputs, there = 0, 0.0
        if (
            decoding
        ):  # when this request decodes, some have ended, and of those on their way not all have come
            life_s = output * (pace_s or costs.decode(1, prompt))
            there = arriving
            if arriving and life_s < delay_s:
                there *= life_s / delay_s
            if delay_s < life_s:
                there += active * (1.0 - delay_s / life_s)
            outputs = round(there)
        held = outputs * each + prompt + produced
        after_s = batches[outputs + 1] + by_context * held
        if after_s < host_s:
            after_s = host_s
        spread_s = tpot_s = after_s / free if role is MIXED else after_s
        crowd = before = 0.0  # over what there is room for, as a share of it
        kept = held + prefill_tokens
        full = kept > FULL * room_tokens > 0
        if full and kept > room_tokens:
            crowd = kept / room_tokens - 1.0
            before = max(0.0, (outputs * each + prefill_tokens) / room_tokens - 1.0)
            spread_s += crowd * tpot_s
        before_s = 0.0
        if outputs:
            before_s = batches[outputs] + by_context * (outputs * each)
            if before_s < host_s:
                before_s = host_s
            spread_s += outputs * (after_s - before_s)
        if there > 0.0:  # perhaps nobody runs then, and there is no step to wait for
            joining_s = JOINING_STEPS * (before_s or costs.decode(1, each)) * (there if there < 1.0 else 1.0)
        if promised:  # `miss`, without its calls: an estimate can't be so low that `exp` would overflow
            own, step = 1 / (1 + exp(unmissed - by_s * tpot_s)), 0.1 * slo_s
            slack_s = max(slo_s - tpot_s, doubt * slo_s)
            handover_slope = (1 / (1 + exp(unmissed - by_s * (tpot_s + step))) - own) / step
            alone = 1 / (1 + exp(unmissed - by_s * tpot_s * before_s / after_s)) if outputs else own
            if crowd:
                own = max(own, too_short(crowd, tpot_s, slo_s))
                alone = max(alone, too_short(before, tpot_s * before_s / after_s, slo_s))
            output_harm = 0.5 * outputs * (own - alone)
    if exposed and promised and role is not DECODE:
        usual_s = beside[-(-exposed // 8)] or 1e-9
        pace = batches[exposed] + by_context * (exposed * each)
        pace = (pace if pace > host_s else host_s) / free
        later = pace + (usual_s / produced if produced > 1.0 else usual_s)
        gone = 1 / (1 + exp(unmissed - by_s * later)) - 1 / (1 + exp(unmissed - by_s * pace))
        prompt_harm = exposed * gone / usual_s
    found = (
        view, now + FRESH_S, role, active, exposed, room, free_at, wait_s, pace_s, prompt_harm, tpot_s,
        own, handover_slope, slack_s, joining_s, output_harm, spread_s, leaving_tokens * token_s, full,
    )  # fmt: skip
    return tuple.__new__(Terms, found)  # much quicker than by name, and made for each change of a worker


def tpot_doubt(share: float, spent_s: float, output_tokens: float, slo_s: float) -> float:
    """How far an estimate of the time per token is off where prompts come in between, as a share of the objective.

    While an output of n tokens keeps its promise, n · slo_s, prompts take `share` of the time, `spent_s` each: if they
    come by Poisson, what they take has the variance share · spent_s · n · slo_s. So a long output is an average over
    many prompts, and a short one is met by one or by none. Lengths that differ and arrivals in crowds make that more,
    hence the factor.
    """
    by_chance = BY_CHANCE * share * spent_s / (slo_s * (output_tokens if output_tokens > 1.0 else 1.0))
    doubt = sqrt(STEADY_DOUBT * STEADY_DOUBT + by_chance)
    return doubt if doubt < MOST_DOUBT else MOST_DOUBT


def too_short(crowd: float, tpot_s: float, slo_s: float) -> float:
    """The probability that an output misses its time per token because it waits for room.

    By Little's law it waits `crowd` times as long as an output takes, so that the short ones miss. Of lengths that are
    log-normal about the mean one, so many are shorter than what makes the wait up (sigma 0.85, where it is a square).
    """
    if tpot_s >= slo_s:
        return 1.0
    square = (crowd * tpot_s / (slo_s - tpot_s)) ** 2
    return square / (1.0 + square)


def first_token_s(terms: Terms, ask: Ask, costs: StepCosts, now: float) -> float:
    """Time to first token from now."""
    left = terms.free_at - now
    ttft_s = terms.wait_s + (left if left > 0.0 else 0.0)
    if not terms.active:
        return ttft_s + ask.alone_s
    extra = costs.beside(ask.tokens, terms.active)
    return ttft_s + extra + terms.pace_s * -(-ask.tokens // terms.room)


def as_source(terms: Terms, ask: Ask, costs: StepCosts, slo: Slo, now: float) -> dict[str, float]:
    """What s adds to a pair's cost, by name."""
    ttft_s, exposed = first_token_s(terms, ask, costs, now), terms.exposed
    extra = costs.beside(ask.tokens, exposed) if exposed else 0.0
    return {
        "ttft_misses": miss(ask.waited_s + ttft_s, slo.ttft_s, TTFT_DOUBT),
        "misses_by_prompt": min(terms.prompt_harm * extra, exposed),
        "waiting_for_prompt": ask.weight * (ttft_s + exposed * extra),
    }


def as_target(terms: Terms, ask: Ask, moves: bool) -> dict[str, float]:
    """What t adds to a pair's cost, by name."""
    moved_s = ask.moved_s + terms.joining_s if moves else 0.0
    by_length = (1.0 - terms.tpot_misses) * too_few(ask.of_many, moved_s / terms.slack_s)
    moved_s /= ask.gaps
    return {
        "tpot_misses": terms.tpot_misses + terms.handover_slope * moved_s + by_length,
        "misses_by_output": terms.output_harm,
        "waiting_for_output": ask.weight * ask.output * (terms.spread_s + moved_s),
    }


def too_few(lengths: tuple[float, ...], tokens: float) -> float:
    """The share of outputs that are too short to make up for what takes as long as so many tokens have to spare."""
    return bisect_left(lengths, tokens) / len(lengths)


def link_cost(source: Terms, ask: Ask, slope: float) -> float:
    """What the pulls that wait for a source's link already cost a request that comes behind them."""
    return source.link_s * (slope / ask.gaps + ask.weight)


def miss(value: float, objective: float, doubt: float) -> float:
    """The probability that an objective is missed, where an estimate is off by about `doubt` of it."""
    if objective == math.inf:
        return 0.0
    z = (value / objective - 1) / doubt
    return 1.0 if z > 30 else 0.0 if z < -30 else 1 / (1 + exp(-z))
