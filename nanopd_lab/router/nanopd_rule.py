"""nanoPD's rule, as a baseline: price the request on one worker and on two, take the cheaper, one worker if equal.

The prices are `cost.nanopd.NanoPDModel`'s, with the load of the workers that would be chosen; output lengths are its
moving averages, which here do learn. There is no queue in it, and what a prompt costs the outputs beside it, it
charges to the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanopd_lab.router.explanation import Candidate, Explanation
from nanopd_lab.router.policy import Decision, JobView, WorkerView
from nanopd_lab.router.static import Collocated, Disaggregated

if TYPE_CHECKING:
    from nanopd_lab.cost.nanopd import NanoPDModel
    from nanopd_lab.router.lengths import LengthPredictor
    from nanopd_lab.router.outlook import Outlook


class NanoPDRule:
    """See the module.

    Args:
        model: its parameters
        predictor: of output lengths; None: nanoPD's own kind
    """

    name = "nanopd"

    def __init__(self, model: NanoPDModel, predictor: LengthPredictor | None = None) -> None:
        if predictor is None:
            from nanopd_lab.router.predictor import BucketedMean

            predictor = BucketedMean()
        self.model, self.predictor = model, predictor
        self._one, self._two = Collocated(), Disaggregated()

    @classmethod
    def of(cls, outlook: Outlook) -> NanoPDRule:
        """With the outlook's parameters, or those that follow from its cost model.

        Raises:
            ValueError: it has neither parameters nor a link.
        """
        if outlook.nanopd is not None:
            return cls(outlook.nanopd)
        from nanopd_lab.cost.derived import derive

        found = derive(
            outlook.iteration,
            link=outlook.transfer,
            block_bytes=outlook.block_bytes,
            block_size=outlook.block_size,
        )
        return cls(found.as_nanopd(outlook.block_bytes // outlook.block_size))

    @classmethod
    def published(cls, device: str) -> NanoPDRule:
        """With the parameters that nanoPD ships for a device, "rtx-4090" or "h20".

        Raises:
            ValueError: another device.
        """
        from nanopd_lab.cost.nanopd import published

        return cls(published(device))

    def choose(self, job: JobView, workers: Sequence[WorkerView], now: float) -> Decision | None:
        one, two = self._one.choose(job, workers, now), self._two.choose(job, workers, now)
        if one is None or two is None:
            return one or two
        views = {view.name: view for view in workers}
        load, batch = views[one.route.decode].jobs, views[two.route.decode].decoding
        out = max(1, round(self.predictor.predict(job.prompt_tokens, job.params.max_tokens).mean))
        alone = self.model.collocated_seconds(job.known_tokens, out, load)
        apart = self.model.disaggregated_seconds(job.known_tokens, out, batch)
        model, known = self.model, job.known_tokens

        def explain() -> Explanation:
            candidates = [
                Candidate(
                    one.route,
                    alone,
                    {
                        "prefill_s": model.prefill_seconds(known),
                        "transfer_s": 0.0,
                        "decode_s": out * model.decode_seconds(max(load, 1)),
                        "interference_s": model.interference_seconds(known, load),
                    },
                ),
                Candidate(
                    two.route,
                    apart,
                    {
                        "prefill_s": model.prefill_seconds(known),
                        "transfer_s": model.transfer_rate_s * known,
                        "decode_s": out * model.decode_seconds(batch + 1),
                        "interference_s": 0.0,
                    },
                ),
            ]
            return Explanation.of(reason, candidates)

        better = two if apart < alone else one
        reason = f"{min(alone, apart):.3f} s by nanoPD's model, {max(alone, apart):.3f} s the other way"
        return Decision(better.route, reason, explainer=explain)

    def finished(self, prompt_tokens: int, output_tokens: int, censored: bool, now: float) -> None:
        """See `Policy`; nanoPD counts an output that was cut off as one that ended."""
        if output_tokens:
            self.predictor.observe(prompt_tokens, output_tokens)
