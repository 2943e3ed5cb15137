"""The adaptive policy: of all pairs of workers the one by which the fewest requests miss their objectives.

For a request at workers s (prefill) and t (decode) it adds up, in expected misses:

    ttft     the request's own: what s has queued, the step under way, its prompt in chunks beside s's decodes
    tpot     the request's own: t's pace with one more output, slowed by the prompts that t gets, and the handover
    prompt   of the outputs that s decodes, each of which waits while the prompt is computed
    output   of the outputs that t decodes, each of which is slower with one more beside it

and, to break ties, the seconds that everybody waits longer. All but the handover depends on s alone or on t alone, so
that the best pair is found in one pass over the workers. Which workers may prefill and decode at all is planned over
many requests (`role_plan`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.core import Route
from nanopd_lab.router.explanation import Candidate, Explanation
from nanopd_lab.router.policy import Decision, JobView, Postponed, Role, WorkerView
from nanopd_lab.router.replay import Room, StepCosts
from nanopd_lab.router.role_plan import HOPELESS, Load, PlanSettings, RolePlan

if TYPE_CHECKING:
    from nanopd_lab.router.lengths import LengthPredictor
    from nanopd_lab.router.outlook import Outlook

SECONDS_WORTH = 0.02  # misses that count as much as the time that a request takes alone
TTFT_DOUBT, TPOT_DOUBT = 0.15, 0.08  # how far estimates are off, as a share of the objective
SURVEYED = 12  # outputs under way that the predictor is told of
PATIENCE, LONGEST_S = (
    20,
    10.0,
)  # how long one that is late lets others pass: so many times its objective, at least so long
MEMORY_S = 4.0  # half of what prompts took on a worker is forgotten


class Terms(NamedTuple):
    """What a view says, worked out once for as long as it is the same.

    active: outputs that it decodes now; outputs: that it will decode when the request comes there
    work_s: to compute the prompts that it has, from the turn of the first on
    pace_s: a decode step now; next_s: with everybody and one more; more_s: what one more adds
    wait_s: until a step takes in who comes
    """

    view: WorkerView
    active: int
    outputs: int
    work_s: float
    pace_s: float
    next_s: float
    more_s: float
    wait_s: float


class Side(NamedTuple):
    """One worker as a source or as a target: expected misses of the request and of others, and seconds.

    value_s: time to first token, or time per output token
    """

    value_s: float
    own: float
    others: float
    seconds: float

    @property
    def cost(self) -> float:
        return self.own + self.others + self.seconds


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
        self._terms: dict[str, Terms] = {}
        self._busy: dict[str, tuple[float, float]] = {}  # seconds of prompts, decayed, and as of when
        self._means: dict[int, float] = {}
        self._mean_prompt, self._mean_output = 512.0, 200.0
        self._pending: dict[str, Role] = {}
        # When those under way should have got their first token, by the prompt's length.
        self._under_way: dict[int, deque[float]] = {}
        link = outlook.transfer
        self._token_s = 0.0 if link is None else outlook.block_bytes / outlook.block_size / link.bytes_per_s
        self._delay_s = 0.0  # until the first token, of late
        self._last: tuple[float, int] | None = None

    # ------------------------------------------------------------------ events

    def finished(self, prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
        """See `Policy`."""
        if came := self._under_way.get(prompt_tokens):
            came.popleft()  # perhaps another one's, of the same length: what is left is as many
            if not came:
                del self._under_way[prompt_tokens]
        if output_tokens:
            self.predictor.observe(prompt_tokens, output_tokens, censored)
            self._means.clear()
            self.plan.has_ended()

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        views = list(workers)
        if job.avoid:
            views = [view for view in views if view.name not in job.avoid] or views
        if (
            not job.postponed and (job.arrival, job.known_tokens) != self._last
        ):  # it may be asked again, where none was found
            self._last = job.arrival, job.known_tokens
            self._mean_prompt += (job.known_tokens - self._mean_prompt) / 50
            self.plan.arrived(now, job.known_tokens, job.params.max_tokens)
        roles = self._roles(list(workers), now)
        if self._pending:  # decided when a job was put off
            roles, self._pending = {**self._pending, **(roles or {})}, {}
        if roles:
            views = [view._replace(role=roles.get(view.name, view.role)) for view in views]
        decision = self._best(job, views, now)
        if isinstance(decision, Postponed):
            self._pending = {**self._pending, **(roles or {})}
            return decision
        if decision is None:
            if not views:
                return None
            roles = {view.name: Role.MIXED for view in views}
            decision = self._best(job, [view._replace(role=Role.MIXED) for view in views], now)
            assert isinstance(decision, Decision)
        if roles:
            return decision._replace(roles=tuple(roles.items()))
        return decision

    # ------------------------------------------------------------------ roles

    def _roles(self, views: Sequence[WorkerView], now: float) -> dict[str, Role] | None:
        """Roles that change now."""
        if self.plan.due:
            self._begin_plan(views, now)
        wanted = self.plan.think()
        if wanted is None or wanted >= len(views):
            return None
        sources = [view for view in views if view.role is Role.PREFILL]
        if wanted == 0:
            return {view.name: Role.MIXED for view in views if view.role is not Role.MIXED} or None
        others = sorted((view for view in views if view.role is not Role.PREFILL), key=lambda v: v.decoding)
        sources.sort(key=lambda view: -view.prefill_tokens)
        chosen = {view.name for view in [*sources, *others][:wanted]}
        roles = {view.name: Role.PREFILL if view.name in chosen else Role.DECODE for view in views}
        return {view.name: roles[view.name] for view in views if view.role is not roles[view.name]} or None

    def _begin_plan(self, views: Sequence[WorkerView], now: float) -> None:
        terms = [self._of(view) for view in views]
        self._survey(terms, now)
        prefills = sum(view.role is Role.PREFILL for view in views)
        leftovers = [0]
        for active in sorted(each.active for each in terms if each.view.role is not Role.PREFILL):
            leftovers.append(leftovers[-1] + active)
        decoding = sum(each.active for each in terms)
        self._mean_output = self.plan.mean_output
        context = sum(
            each.view.decode_tokens - each.view.arriving_tokens + each.active * self._mean_output / 2
            for each in terms
        )
        backlog = sum(self._left_s(each, now) for each in terms)
        view = views[0]
        room = Room(view.max_num_seqs or 1 << 30, view.num_blocks * view.block_size or math.inf)
        self.plan.begin(len(views), prefills, leftovers, Load(decoding, context, backlog, room))

    def _survey(self, terms: Sequence[Terms], now: float) -> None:
        """Tell the predictor of outputs under way, some of them: those that end first are the short ones."""
        survey = getattr(self.predictor, "survey", None)
        active = sum(each.active for each in terms)
        if survey is None or not active:
            return
        pace_s = (
            sum(each.active * each.pace_s / (1 - self._share(each.view.name, now)) for each in terms) / active
        )
        running = sorted(
            (begun, prompt) for prompt, times in self._under_way.items() for begun in times if begun < now
        )
        step = max(1, len(running) // SURVEYED)
        told = [(prompt, int((now - begun) / pace_s)) for begun, prompt in running[step // 2 :: step]]
        # That outputs have not ended long before anybody expects it says little, and would count for much.
        longest = max((produced for _, produced in told), default=0)
        survey(told if longest > self._mean_output / 2 else [])

    # ------------------------------------------------------------------ one decision

    def _best(self, job: JobView, views: Sequence[WorkerView], now: float) -> Decision | Postponed | None:
        tokens = job.uncached_tokens
        output = self._mean(job)
        alone_s = self.costs.prompt(tokens) + output * self.costs.decode(1, tokens)
        weight = SECONDS_WORTH / alone_s
        pull_s = self.costs.last_pull(tokens)
        sources: list[tuple[int, Side]] = []
        targets: list[tuple[int, Side]] = []
        moved = pull_s / max(1.0, output - 1)
        terms = [self._of(view) for view in views]
        linked: dict[int, float] = {}
        waited = now - job.arrival
        for number, each in enumerate(terms):
            role = each.view.role
            if role.prefills:
                sources.append((number, self._source(each, tokens, output, waited, weight, now)))
            if role.decodes:
                targets.append((number, self._target(each, tokens, output, moved, weight, now)))
        if targets and self._token_s:
            pace = min(side.value_s for _, side in targets)
            for number, _ in sources:
                if queue := terms[number].view.leaving_tokens * self._token_s:
                    link = miss(pace + queue / max(1.0, output - 1), self.slo.tpot_s, TPOT_DOUBT)
                    link += weight * queue - miss(pace, self.slo.tpot_s, TPOT_DOUBT)
                    linked[number] = link
        if not sources or not targets:
            return None
        best: tuple[float, int, int] | None = None
        # The best pair of two takes the best of each side, or the second best of one where they are the same worker.
        few_sources = sorted(sources, key=lambda side: side[1].cost + linked.get(side[0], 0.0))[:2]
        few_targets = sorted(targets, key=lambda side: side[1].cost)[:2]
        for s, source in few_sources:
            for t, target in few_targets:
                cost = source.cost + target.cost + linked.get(s, 0.0)
                if s != t and (best is None or cost < best[0]):
                    best = cost, s, t
        if len(sources) + len(targets) > len(terms):
            own = dict(sources)
            stays = 0.0
            for t, _ in targets:
                if t in own:
                    each = terms[t]
                    target = self._target(each, tokens, output, 0.0, weight, now)
                    stays = own[t].cost + target.cost
                    if best is None or stays <= best[0]:
                        best = stays, t, t
        assert best is not None or len(terms) == 1
        if best is None:
            return None
        cost, s, t = best
        first = dict(sources)[s]
        late = waited + first.value_s > HOPELESS * self.slo.ttft_s
        if late and waited < max(LONGEST_S, PATIENCE * self.slo.ttft_s):
            idle = sum(not terms[number].view.prefilling for number, _ in sources)
            if idle < min(2, len(sources)):
                return Postponed(f"first token in {1e3 * first.value_s:.0f} ms where it does least harm")
        source_name, target_name = terms[s].view.name, terms[t].view.name
        if terms[s].view.role is Role.MIXED:
            self._charge(source_name, self.costs.beside(tokens, terms[s].active), now)
        self._under_way.setdefault(job.prompt_tokens, deque()).append(now + first.value_s)
        self._delay_s += (first.value_s - self._delay_s) / 20
        second = self._target(terms[t], tokens, output, moved if s != t else 0.0, weight, now)

        def explain() -> Explanation:
            candidates = []
            for i, a in sources:
                for j, b in targets:
                    if i == j:
                        b = self._target(terms[j], tokens, output, 0.0, weight, now)
                    candidates.append(
                        Candidate(
                            Route(terms[i].view.name, terms[j].view.name),
                            a.cost + b.cost + (linked.get(i, 0.0) if i != j else 0.0),
                            {
                                "misses_by_link": linked.get(i, 0.0) if i != j else 0.0,
                                "ttft_misses": a.own,
                                "tpot_misses": b.own,
                                "misses_by_prompt": a.others,
                                "misses_by_output": b.others,
                                "waiting": a.seconds + b.seconds,
                            },
                        )
                    )
            return Explanation.of(reason, candidates)

        reason = (
            f"first token in {1e3 * first.value_s:.0f} ms, {1e3 * second.value_s:.1f} ms a token, "
            f"{cost:.3f} misses in all"
        )
        return Decision(Route(source_name, target_name), reason, explainer=explain)

    def _source(
        self, each: Terms, tokens: int, output: float, waited: float, weight: float, now: float
    ) -> Side:
        costs = self.costs
        if each.active:
            extra = costs.beside(tokens, each.active)
            steps = -(-tokens // max(1, costs.budget - each.active))
            own_s = extra + steps * each.pace_s
        else:
            extra, own_s = 0.0, costs.prompt(tokens)
        ttft_s = self._left_s(each, now) + each.wait_s + own_s
        if each.view.prefilling:
            ttft_s += costs.rest_s  # of the step, which whoever comes next fills
        own = miss(waited + ttft_s, self.slo.ttft_s, TTFT_DOUBT)
        others = 0.0
        if each.active:
            pace = each.pace_s / (1 - self._share(each.view.name, now))
            later = pace + extra / max(1.0, self._mean_output / 2)
            others = each.active * (
                miss(later, self.slo.tpot_s, TPOT_DOUBT) - miss(pace, self.slo.tpot_s, TPOT_DOUBT)
            )
        return Side(ttft_s, own, others, weight * (ttft_s + each.active * extra))

    def _target(
        self, each: Terms, tokens: int, output: float, moved: float, weight: float, now: float
    ) -> Side:
        free = 1 - (self._share(each.view.name, now) if each.view.role is Role.MIXED else 0.0)
        tpot_s = each.next_s / free + moved
        own = miss(tpot_s, self.slo.tpot_s, TPOT_DOUBT)
        others = 0.0
        if each.outputs:
            pace = (each.next_s - each.more_s) / free
            others = (
                0.5
                * each.outputs
                * (
                    miss(each.next_s / free, self.slo.tpot_s, TPOT_DOUBT)
                    - miss(pace, self.slo.tpot_s, TPOT_DOUBT)
                )
            )
        return Side(tpot_s, own, others, weight * output * (tpot_s + each.outputs * each.more_s))

    # ------------------------------------------------------------------ what a view says

    def _of(self, view: WorkerView) -> Terms:
        found = self._terms.get(view.name)
        if found is not None and found.view is view:
            return found
        costs = self.costs
        active = view.decoding - view.arriving
        produced = self._mean_output / 2
        context = view.decode_tokens - view.arriving_tokens + active * produced
        pace_s = costs.decode(active, context) if active else 0.0
        work_s = 0.0
        if view.prefilling:
            mean = max(1, view.prefill_tokens // view.prefilling)
            if active:
                steps = view.prefill_tokens / max(1, costs.budget - active)
                work_s = view.prefilling * costs.beside(mean, active) + steps * pace_s
            else:
                work_s = view.prefilling * costs.prompt(mean)
        # When this request decodes, some that do now have ended, and of those on their way not all have come.
        life_s = self._mean_output * (pace_s or costs.decode(1, self._mean_prompt))
        stay = max(0.0, 1.0 - self._delay_s / life_s)
        come = min(1.0, life_s / self._delay_s) if self._delay_s else 1.0
        outputs = round(active * stay + view.arriving * come)
        each_tokens = view.decode_tokens / view.decoding + produced if view.decoding else 0.0
        before_s = costs.decode(outputs, outputs * each_tokens)
        next_s = costs.decode(outputs + 1, outputs * each_tokens + self._mean_prompt + produced)
        wait_s = costs.wait_steps * pace_s if active and not view.prefilling else 0.0
        found = Terms(
            view,
            active,
            outputs,
            work_s,
            pace_s,
            next_s,
            next_s - before_s if outputs else 0.0,
            wait_s,
        )
        self._terms[view.name] = found
        return found

    def _left_s(self, each: Terms, now: float) -> float:
        if not each.view.prefilling:
            return 0.0
        return max(0.0, each.work_s - max(0.0, now - each.view.prefill_since))

    def _mean(self, job: JobView) -> float:
        kind = job.prompt_tokens.bit_length()
        found = self._means.get(kind)
        if found is None:
            found = self.predictor.predict(job.prompt_tokens, job.params.max_tokens).quantile(0.5)
            self._means[kind] = found
        return found

    def _charge(self, name: str, seconds: float, now: float) -> None:
        total, since = self._busy.get(name, (0.0, now))
        self._busy[name] = total * 0.5 ** ((now - since) / MEMORY_S) + seconds, now

    def _share(self, name: str, now: float) -> float:
        """Of a worker's time that prompts have taken lately."""
        found = self._busy.get(name)
        if found is None:
            return 0.0
        total, since = found
        return min(0.8, total * 0.5 ** ((now - since) / MEMORY_S) * math.log(2) / MEMORY_S)


def miss(value: float, objective: float, doubt: float) -> float:
    """The probability that an objective is missed, where an estimate is off by about `doubt` of it."""
    if objective == math.inf:
        return 0.0
    z = (value / objective - 1) / doubt
    return 1.0 if z > 30 else 0.0 if z < -30 else 1 / (1 + math.exp(-z))
