"""What a route would cost, and a rule that chooses by it: the small sibling of the adaptive policy.

Everything is estimated from what the views say now, for each pair of workers, so that it can be read, taken apart and
exchanged piece by piece (`RouterParts`): how long the first token takes, which pair is chosen, how long an output will
be. It looks at all pairs, which is for a few workers, and remembers nothing but lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nanopd_lab.core import Route
from nanopd_lab.router.explanation import Candidate, Explanation
from nanopd_lab.router.policy import Decision, JobView, WorkerView
from nanopd_lab.router.predictor.conjugate import NormalInverseGamma
from nanopd_lab.router.predictor.log_lengths import FIRST_BELIEF, LogLengths, OneBelief
from nanopd_lab.router.slo import Slo

if TYPE_CHECKING:
    from nanopd_lab.router.outlook import Outlook

AIM_TTFT, AIM_TPOT = 0.67, 0.8  # of the objectives: estimates are off, and more requests will come

StepSeconds = Callable[[int, int], float]
"""Of a step with so many tokens of prompts beside so many outputs."""


class Estimate(NamedTuple):
    """What a route is expected to do to the request, and to the outputs that its prompt delays.

    ttft_s:   from the request's arrival to its first token
    tpot_s:   per token behind it, the handover included
    outputs:  that the source decodes
    before_s: per token of each of those, without the prompt; after_s: with it
    """

    ttft_s: float
    tpot_s: float
    outputs: int = 0
    before_s: float = 0.0
    after_s: float = 0.0

    def missed(self, slo: Slo) -> dict[str, int]:
        """Promises that the route breaks: the request's own, and those of outputs that kept theirs without it."""
        return {
            "own_ttft": int(self.ttft_s > slo.ttft_s),
            "own_tpot": int(self.tpot_s > slo.tpot_s),
            "others_tpot": self.outputs if self.before_s <= slo.tpot_s < self.after_s else 0,
        }


Estimator = Callable[[WorkerView, WorkerView], Estimate]
"""Of the request that waits for a route, by source and target."""

Rule = Callable[[JobView, Sequence[WorkerView], Estimator, Slo], Route | None]


def time_to_first_token(
    queued_tokens: int, prompt_tokens: int, outputs: int, budget: int, step_s: StepSeconds
) -> float:
    """Seconds until a prompt that comes now is computed.

    The queue's tokens come first, then the prompt's, in steps of `budget` tokens. A step serves the outputs first, one
    token each, and prompts get the rest of the budget; the last step takes what is left.

    Args:
        outputs: fewer than `budget`
    """
    left, seconds = queued_tokens + prompt_tokens, 0.0
    while left > 0:
        chunk = min(left, budget - outputs)
        seconds += step_s(chunk, outputs)
        left -= chunk
    return seconds


def first_fit(job: JobView, workers: Sequence[WorkerView], estimate: Estimator, slo: Slo) -> Route | None:
    """The pair that breaks the fewest promises; of equal ones the least excess, and then the order decides.

    None if there is no pair that may; a worker that failed the request before is the last resort.

    Prompts go to the first worker that will do and outputs to the last one. So prompts fill the workers from one end
    and outputs from the other, as full as promises allow, and where they meet moves with the load: roles that nobody
    has assigned (first fit, as in bin packing).
    """
    best: tuple[bool, int, float, int, int] | None = None
    route = None
    for first, source in enumerate(workers):
        for last, target in enumerate(workers):
            if not (source.role.prefills and target.role.decodes):
                continue
            found = estimate(source, target)
            failed = bool(job.avoid & {source.name, target.name})
            excess = max(0.0, found.ttft_s / slo.ttft_s - 1) + max(0.0, found.tpot_s / slo.tpot_s - 1)
            key = failed, sum(found.missed(slo).values()), excess, first, -last
            if best is None or key < best:
                best, route = key, Route(source.name, target.name)
    return route


@dataclass(frozen=True)
class RouterParts:
    """What `ByEstimate` is made of; a notebook puts a learner's own in.

    ttft:    see `time_to_first_token`
    rule:    see `first_fit`
    lengths: makes a `LogLengths` of a first belief
    """

    ttft: Callable[[int, int, int, int, StepSeconds], float] = time_to_first_token
    rule: Rule = first_fit
    lengths: Callable[[NormalInverseGamma], LogLengths] = LogLengths


class ByEstimate:
    """A policy that estimates what each pair of workers would do, and lets a rule choose.

    The rule sees objectives that are stricter than those promised, by AIM_TTFT and AIM_TPOT.

    Args:
        outlook: what is known before anything has run
        parts: what it is made of

    Raises:
        ValueError: no objective for both times, without which there is nothing to keep.
    """

    name = "first-fit"

    def __init__(self, outlook: Outlook, parts: RouterParts | None = None) -> None:
        slo = outlook.slo
        if max(slo.ttft_s, slo.tpot_s) == math.inf:
            raise ValueError(
                f"objectives {str(slo) or 'none'!r}; this policy keeps both a time to first token and a time per "
                'token, so promise both, as goodput=("ttft:500", "tpot:50")'
            )
        self.outlook, self.parts = outlook, parts or RouterParts()
        self.slo = Slo(AIM_TTFT * slo.ttft_s, AIM_TPOT * slo.tpot_s)
        self.predictor = outlook.predictor or OneBelief(self.parts.lengths(FIRST_BELIEF))

    def finished(self, prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
        """See `Policy`."""
        if output_tokens:
            self.predictor.observe(prompt_tokens, output_tokens, censored)

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        views = tuple(workers)
        output = self.predictor.predict(job.prompt_tokens, job.params.max_tokens).quantile(0.5)
        asked = _Asked(self, job, output, now)
        route = self.parts.rule(job, views, asked, self.slo)
        if route is None:
            return None
        chosen, slo = route, self.slo

        def explain() -> Explanation:
            candidates = []
            for source in views:
                for target in views:
                    if source.role.prefills and target.role.decodes:
                        found = asked(source, target)
                        terms = {f"missed_{name}": float(n) for name, n in found.missed(slo).items()}
                        pair = Route(source.name, target.name)
                        candidates.append(Candidate(pair, sum(terms.values()), terms))
            candidates.sort(key=lambda each: (each.route != chosen, each.cost))
            best, *others = candidates
            gains = {name: others[0].terms[name] - best.terms[name] for name in best.terms} if others else {}
            decided = max(gains, key=lambda name: gains[name], default="")
            return Explanation(chosen, reason, decided if gains.get(decided) else "", tuple(candidates))

        by_name = {view.name: view for view in views}
        found = asked(by_name[route.prefill], by_name[route.decode])
        reason = f"first token in {1e3 * found.ttft_s:.0f} ms, {1e3 * found.tpot_s:.1f} ms a token"
        return Decision(route, reason, explainer=explain)

    # ------------------------------------------------------------------ estimates

    def source(self, job: JobView, view: WorkerView, output: float, now: float) -> Estimate:
        """What the prompt does at its source: `ttft_s`, and what it does to the outputs there.

        Args:
            output: expected tokens of an output
        """
        outputs, step_s = view.decoding - view.arriving, self._step_s(view, output)
        room = max(1, self._budget(view) - outputs)
        queue_s, whole_s = (
            self.parts.ttft(view.prefill_tokens, tokens, outputs, room + outputs, step_s)
            for tokens in (0, job.uncached_tokens)
        )
        own_s = whole_s - queue_s
        gone_s = now - view.prefill_since if view.prefilling else 0.0  # of the queue, some is done
        ttft_s = now - job.arrival + max(own_s, whole_s - gone_s)
        if not outputs:
            return Estimate(ttft_s, 0.0)
        before_s = step_s(0, outputs)
        late_s = max(0.0, own_s - math.ceil(job.uncached_tokens / room) * before_s)
        # An output is halfway through, as far as anybody knows.
        return Estimate(ttft_s, 0.0, outputs, before_s, before_s + late_s / max(1.0, output / 2))

    def target(self, view: WorkerView, output: float) -> float:
        """Seconds a token beside the outputs of a worker and behind the prompts that it has."""
        outputs, step_s = view.decoding + 1, self._step_s(view, output)
        pace_s = step_s(0, outputs)
        if not view.prefill_tokens:
            return pace_s
        room = max(1, self._budget(view) - outputs)
        with_prompts_s = self.parts.ttft(view.prefill_tokens, 0, outputs, room + outputs, step_s)
        return pace_s + max(0.0, with_prompts_s - math.ceil(view.prefill_tokens / room) * pace_s) / output

    def handover(self, job: JobView, output: float) -> float:
        """Seconds a token, for the KV to move."""
        out = self.outlook
        blocks = math.ceil(job.known_tokens / out.block_size)
        seconds = out.transfer.seconds(blocks, blocks * out.block_bytes) if out.transfer else 0.0
        return seconds / max(1.0, output - 1)

    def _budget(self, view: WorkerView) -> int:
        return view.max_num_batched_tokens or self.outlook.max_num_batched_tokens

    def _step_s(self, view: WorkerView, output: float) -> StepSeconds:
        """Of a step at this worker, each output with the context that they have on average there."""
        from nanopd_lab.cost.iteration import StepFeatures

        model, outputs = self.outlook.iteration, view.decoding - view.arriving
        known = (view.decode_tokens - view.arriving_tokens) / outputs if outputs else 0.0
        context = known + output / 2

        def seconds(tokens: int, outputs: int) -> float:
            of_prompt = tokens * tokens / 2
            read = round(outputs * (context + 1)) + tokens
            chunks = outputs + (tokens > 0)
            return model.of_features(
                StepFeatures(tokens + outputs, chunks, of_prompt + outputs * context, read, chunks)
            )

        return seconds


class _Asked:
    """The estimator of one request: what a worker does as a source and as a target is worked out once."""

    def __init__(self, policy: ByEstimate, job: JobView, output: float, now: float) -> None:
        self._policy, self._job, self._output, self._now = policy, job, output, now
        self._sources: dict[str, Estimate] = {}
        self._targets: dict[str, float] = {}
        self._handover_s = policy.handover(job, output)

    def __call__(self, source: WorkerView, target: WorkerView) -> Estimate:
        found = self._sources.get(source.name)
        if found is None:
            found = self._policy.source(self._job, source, self._output, self._now)
            self._sources[source.name] = found
        tpot_s = self._targets.get(target.name)
        if tpot_s is None:
            tpot_s = self._targets[target.name] = self._policy.target(target, self._output)
        moved_s = 0.0 if source.name == target.name else self._handover_s
        return found._replace(tpot_s=tpot_s + moved_s)
