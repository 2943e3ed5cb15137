"""The adaptive policy: of all pairs of workers the one by which the fewest requests miss their objectives.

What a pair costs is in `estimates`; all but the handover depends on one of the two workers alone, so that the best pair
is found in one pass over the workers. Which of them may prefill and decode at all is planned over many requests
(`role_plan`). A request that would be late anyhow lets others pass until a worker has nothing better to do, as it costs
them time and gains nothing by it; not for ever.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import partial
from math import exp
from typing import TYPE_CHECKING

from nanopd_lab.core import Route
from nanopd_lab.router.arrivals import certain
from nanopd_lab.router.estimates import (
    MEMORY_S,
    SECONDS_WORTH,
    TTFT_DOUBT,
    Ask,
    Terms,
    Typical,
    as_source,
    as_target,
    first_token_s,
    link_cost,
    terms_of,
)
from nanopd_lab.router.explanation import Candidate, Explanation
from nanopd_lab.router.fleetwide import Fleetwide, role_changes
from nanopd_lab.router.policy import Decision, JobView, Postponed, Role, WorkerView
from nanopd_lab.router.role_plan import HOPELESS, PlanSettings, RolePlan
from nanopd_lab.router.step_costs import StepCosts
from nanopd_lab.router.under_way import PromptShares, UnderWay

if TYPE_CHECKING:
    from nanopd_lab.router.lengths import LengthPredictor
    from nanopd_lab.router.outlook import Outlook

# A late one lets others pass for so many times its objective, and for so many seconds at least.
PATIENCE, LONGEST_S = 60, 30.0
CALM_GAPS = 5  # after so many mean gaps without an arrival nobody is expected
CLOSE = 0.05  # of the time per token: mixed workers hand over to each other if it takes no more
TIGHT = 2  # a first token in no more than so many times what it takes beside one output is tight
QUICK = 0.25  # of a prompt's own time: its KV moves quickly if it takes no more
REFRESH = 16  # ends after which forecasts are asked for anew; half of all, once that is more
PREFILL, DECODE, MIXED = Role.PREFILL, Role.DECODE, Role.MIXED
OUTPUTS = 15  # equally likely outputs that a forecast is replaced by
# Outputs that wait for a link or for room, so many and by those that run: something has changed, and a plan is due.
CROWD, CROWDED = 4, 0.25
# Misses that a decision expects, on average over some: a plan is due; theirs count half after about eleven others.
TROUBLE, OF_LATE = 0.4, 16
USUAL = 50  # requests over which means are taken


class Adaptive:
    """See the module.

    Args:
        outlook: what is known before anything has run
        settings: of the role plan
    """

    name = "adaptive"

    def __init__(self, outlook: Outlook, settings: PlanSettings | None = None) -> None:
        predictor = outlook.predictor
        if predictor is None:
            from nanopd_lab.router.predictor import BayesianLengths

            predictor = BayesianLengths()
        self.predictor: LengthPredictor = predictor
        self.slo = outlook.slo
        self.costs = StepCosts(outlook)
        self.plan = RolePlan(self.costs, self.slo, predictor, settings)
        link = outlook.transfer
        self._token_s = 0.0 if link is None else outlook.block_bytes / outlook.block_size / link.bytes_per_s
        self._terms: dict[str, Terms] = {}
        # Tokens behind the first of equally likely outputs, by the bits of the prompt's length.
        self._outputs: dict[int, tuple[float, ...]] = {}
        self._refresh = 1
        self._mean_prompt, self._delay_s = 512.0, 0.0
        self._last = (0.0, 0)  # who came last: when, and its tokens
        self._gap_s = 0.0  # between arrivals
        self._slope = 0.0  # misses for each second a token more, where the last request went
        self._misses = 0.0  # that decisions of late expected: of the request and of those that run
        self._pending: dict[str, Role] = {}  # roles that were decided while a job was put off
        self._under_way, self._shares = UnderWay(), PromptShares(MEMORY_S)

    # ------------------------------------------------------------------ events

    def finished(self, prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
        """See `Policy`."""
        self._under_way.ended(prompt_tokens, output_tokens, now)
        if output_tokens:
            self.predictor.observe(prompt_tokens, output_tokens, censored)
            self.plan.has_ended(prompt_tokens, output_tokens)
            if self.plan.ended >= self._refresh:
                self._refresh += max(REFRESH, self._refresh // 2)
                self._outputs.clear()

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        views = list(workers)
        if not views:
            return None
        begins = not self._last[1]
        if not job.postponed and (job.arrival, job.known_tokens) != self._last:  # not asked again in vain
            self._arrived(job, now)
        roles = self._first_roles(job, views) if begins else self._roles(views, now)
        if job.avoid:
            views = [view for view in views if view.name not in job.avoid] or views
        if roles:
            views = [view._replace(role=roles.get(view.name, view.role)) for view in views]
        answer = self._best(job, views, now)
        if isinstance(answer, Postponed):
            self._pending = roles
            return answer
        if answer is None:  # nobody may prefill, or nobody decode: then everybody does both
            roles = {view.name: Role.MIXED for view in workers}
            answer = self._best(job, [view._replace(role=Role.MIXED) for view in views], now)
            if not isinstance(answer, Decision):
                self._pending = roles
                return answer
        return answer._replace(roles=tuple(roles.items())) if roles else answer

    def _arrived(self, job: JobView, now: float) -> None:
        if self._last[1]:
            self._gap_s += (job.arrival - self._last[0] - self._gap_s) / 20
        self._last = job.arrival, job.known_tokens
        self._mean_prompt += (job.known_tokens - self._mean_prompt) / USUAL
        self.plan.arrived(now, job.known_tokens, job.params.max_tokens)

    # ------------------------------------------------------------------ roles

    def _first_roles(self, job: JobView, views: Sequence[WorkerView]) -> dict[str, Role]:
        """Until there is a plan: halves, if the time to the first token is tight and hand-overs are cheap.

        Outputs that run on mixed workers would hold prompts up for as long as they last, also when roles have changed.
        """
        ask, half = self._ask(job, job.arrival), len(views) // 2
        busy_s = ask.alone_s + self.costs.wait_steps * self.costs.decode(1, ask.tokens)
        if not half or self.slo.ttft_s > TIGHT * busy_s or ask.pull_s > QUICK * ask.alone_s:
            return {}
        if any(view.role is not Role.MIXED or view.jobs for view in views):
            return {}
        return {view.name: PREFILL if number < half else DECODE for number, view in enumerate(views)}

    def _roles(self, views: Sequence[WorkerView], now: float) -> dict[str, Role]:
        """Roles that change now; those that have been decided and not taken up yet count as if they were."""
        pending, self._pending = self._pending, {}
        if pending:
            views = [view._replace(role=pending.get(view.name, view.role)) for view in views]
        if self.plan.may_hurry and (self._misses > TROUBLE or _crowded(views)):
            self.plan.hurry()
        if self.plan.due:
            self._begin_plan(views, now)
        wanted = self.plan.think()
        if wanted is None or wanted >= len(views):
            return pending
        return {**pending, **role_changes(views, wanted)}

    def _begin_plan(self, views: Sequence[WorkerView], now: float) -> None:
        typical, terms = self._typical(), []
        for view in views:
            each = self._terms.get(view.name)
            if each is None or each.view is not view or now >= each.until:
                each = self._look(view, typical, now)
            terms.append(each)
        paces = [each.active * each.pace_s / (1 - self._shares.of(each.view.name, now)) for each in terms]
        pace_s = sum(paces) / max(1, sum(each.active for each in terms))
        ages = self._under_way.ages(now, pace_s)
        fleet = Fleetwide.of(terms, self.plan.mean_output, ages, now)
        ended, going = self._under_way.begun_since(self.plan.since, now)
        self.plan.begin(fleet._replace(ends=self._under_way.lengths, ended=ended, going=going))

    # ------------------------------------------------------------------ one decision

    def _ask(self, job: JobView, now: float) -> Ask:
        tokens, costs, kind = job.uncached_tokens, self.costs, job.prompt_tokens.bit_length()
        of_many = self._outputs.get(kind)
        if of_many is None:
            ahead = self.predictor.predict(job.prompt_tokens, job.params.max_tokens)
            levels = certain(self.plan.lengths.of(kind).ends, OUTPUTS)
            of_many = self._outputs[kind] = tuple([ahead.quantile(level) - 1.0 for level in levels])
        gaps = max(1.0, of_many[OUTPUTS // 2])
        output = gaps + 1.0
        alone_s, (pull_s, seen_s) = costs.prompt(tokens), costs.pulls(tokens)
        weight = SECONDS_WORTH / (alone_s + output * costs.decode(1, tokens))
        return Ask(tokens, alone_s, pull_s, seen_s, gaps, output, now - job.arrival, weight, of_many)

    def _best(self, job: JobView, views: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        ask, slo, costs = self._ask(job, now), self.slo, self.costs
        slope = self._slope
        found = self._pair(ask, views, now)
        if found is None:
            return None
        s, t, far, cost = found
        self._misses += (min(1.0, cost) - self._misses) / OF_LATE
        first_s, waited_s = first_token_s(s, ask, costs, now), ask.waited_s
        late = waited_s + first_s > HOPELESS * slo.ttft_s
        if late and waited_s < max(LONGEST_S, PATIENCE * slo.ttft_s):
            calm = now - self._last[0] > CALM_GAPS * self._gap_s
            queues = [view.prefilling for view in views if view.role is not DECODE]
            if s.view.prefilling or queues.count(0) < (1 if calm else min(2, len(queues))):
                return Postponed(f"first token in {1e3 * first_s:.0f} ms where it does least harm")
        self._slope = t.handover_slope
        self._delay_s += (first_s - self._delay_s) / 20
        if s.role is MIXED:
            self._shares.charge(
                s.view.name, costs.beside(ask.tokens, s.active) if s.active else ask.alone_s, now
            )
        self._under_way.begins(job.prompt_tokens, now + first_s)
        route = Route(s.view.name, t.view.name)
        explain = partial(self._explain, route, views, self._terms.copy(), ask, slope, far, now)
        return Decision(route, explainer=explain)

    def _pair(
        self, ask: Ask, views: Sequence[WorkerView], now: float
    ) -> tuple[Terms, Terms, bool, float] | None:
        """The pair of the lowest cost, whether KV is far (it moves only between workers of two roles), and the cost.

        One pass: the best and the second best of sources and of targets, and the best worker that is both. What
        `as_source` and `as_target` say stands here without a call for each worker, and as far as it takes to see that a
        worker is not among the best: no part of a cost is negative.
        """
        slo, known = self.slo, self._terms
        tokens, alone_s, _, moved_s, gaps, output, waited_s, weight, of_many = ask
        by_token, by_link = weight * output, self._slope / gaps + weight
        latest_s, scale = slo.ttft_s - waited_s, TTFT_DOUBT * slo.ttft_s
        beside, typical = self.costs.beside_all(tokens), self._typical()
        source = second_source = target = second_target = stays = None
        source_cost = second_source_cost = target_cost = second_target_cost = stays_cost = math.inf
        least_tpot_s, move = math.inf, moved_s / gaps * by_token
        decodes = extra = 0.0
        for view in views:
            each = known.get(view.name)
            if each is None or each[0] is not view or now >= each[1]:
                each = self._look(view, typical, now)
            (
                _, _, role, active, exposed, room, free_at, wait_s, pace_s, harm,
                tpot_s, own, late, slack_s, joining_s, more, spread, link, full,
            ) = each  # fmt: skip
            if role is not PREFILL:
                decodes = own + more + by_token * spread
                # A mixed worker that is full keeps its room: others' outputs would wait there, and its own prompts.
                if decodes + move < second_target_cost and (role is DECODE or not full):
                    all_s = moved_s + joining_s
                    comes = decodes + all_s / gaps * (late + by_token)
                    if comes < second_target_cost:
                        comes += (1.0 - own) * bisect_left(of_many, all_s / slack_s) / OUTPUTS
                    if comes < target_cost:
                        second_target, second_target_cost = target, target_cost
                        target, target_cost = each, comes
                    elif comes < second_target_cost:
                        second_target, second_target_cost = each, comes
                if tpot_s < least_tpot_s:
                    least_tpot_s = tpot_s
                if role is DECODE:
                    continue
            first_s = wait_s + free_at - now if free_at > now else wait_s
            if active:
                extra = beside[-(-active // 8)]
                first_s += extra + pace_s * -(-tokens // room)
            else:
                first_s += alone_s
            prefills = weight * first_s
            if exposed:
                if exposed != active:
                    extra = beside[-(-exposed // 8)]
                harmed = harm * extra
                prefills += (harmed if harmed < exposed else exposed) + weight * exposed * extra
            both = role is MIXED and prefills + decodes < stays_cost
            if prefills >= second_source_cost and not both:
                continue
            if scale < math.inf:
                prefills += 1 / (1 + exp((latest_s - first_s) / scale))
            if both and prefills + decodes < stays_cost:
                stays, stays_cost = each, prefills + decodes
            if link:
                prefills += link * by_link
            if prefills < source_cost:
                second_source, second_source_cost = source, source_cost
                source, source_cost = each, prefills
            elif prefills < second_source_cost:
                second_source, second_source_cost = each, prefills
        s = t = stays
        # Where KV takes long to move, the links fill before anybody sees it in a queue.
        far = ask.pull_s / gaps > CLOSE * min(slo.tpot_s, least_tpot_s)
        for a, prefills, b, decodes in (
            (source, source_cost, target, target_cost),
            (second_source, second_source_cost, target, target_cost),
            (source, source_cost, second_target, second_target_cost),
        ):
            if a is None or b is None or a is b or (far and a.role is MIXED and b.role is MIXED):
                continue
            if prefills + decodes < stays_cost:
                s, t, stays_cost = a, b, prefills + decodes
        return None if s is None or t is None else (s, t, far, stays_cost)

    def _explain(
        self,
        route: Route,
        views: Sequence[WorkerView],
        known: Mapping[str, Terms],
        ask: Ask,
        slope: float,
        far: bool,
        now: float,
    ) -> Explanation:
        """All pairs that were considered, with the terms of their costs as they were."""
        candidates = []
        every = [known[view.name] for view in views]
        for s in every:
            for t in every:
                roles = s.role, t.role
                if roles[0] is Role.DECODE or roles[1] is Role.PREFILL:
                    continue
                moves = s is not t
                if moves and t.role is MIXED and (t.full or (far and s.role is MIXED)):
                    continue
                found = {**as_source(s, ask, self.costs, self.slo, now), **as_target(t, ask, moves)}
                found["misses_by_link"] = link_cost(s, ask, slope) if moves else 0.0
                pair = Route(s.view.name, t.view.name)
                candidates.append(Candidate(pair, math.fsum(found.values()), found))
        candidates.sort(key=lambda each: each.route != route)  # the first of equals is named first
        first_s, tpot_s = (
            first_token_s(known[route.prefill], ask, self.costs, now),
            known[route.decode].tpot_s,
        )
        reason = f"first token in {1e3 * first_s:.0f} ms, {1e3 * tpot_s:.1f} ms a token"
        return Explanation.of(reason, candidates)

    # ------------------------------------------------------------------ what is known of a worker

    def _typical(self) -> Typical:
        return Typical(max(1, int(self._mean_prompt)), self.plan.mean_output, self._delay_s)

    def _look(self, view: WorkerView, typical: Typical, now: float) -> Terms:
        share = 0.0 if view.role is DECODE else self._shares.of(view.name, now)
        found = terms_of(view, self.costs, self.slo, typical, share, self._token_s, now)
        self._terms[view.name] = found
        return found


def _crowded(views: Sequence[WorkerView]) -> bool:
    """True if KV piles up where prompts are computed, as decode workers have no room for it or links no time."""
    leaving = sum([view.leaving for view in views])
    return leaving > CROWD + CROWDED * sum([view.decoding - view.arriving for view in views])
