"""Run requests that arrive one after another, and see in a cluster's recorded steps who waited for whom."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.core import SamplingParams
from nanopd_lab.engine.prompts import Prompt

Work = tuple[Prompt, SamplingParams]


def run_with_latecomer(
    cluster: Cluster, early: Sequence[Work], late: Work, after_tokens: int
) -> list[ClusterOutput]:
    """Serve `early`, and once each of them has `after_tokens` tokens (or has ended) also `late`; returns all outputs,
    settled, in this order."""
    names = [cluster.submit(*each) for each in early]
    outputs: dict[str, ClusterOutput] = {}
    while len(outputs) <= len(early) or not all(output.settled for output in outputs.values()):
        outputs |= {output.request_id: output for output in cluster.poll(0.1)}
        ready = [o for o in outputs.values() if o.finished or len(o.outputs[0].token_ids) >= after_tokens]
        if len(names) == len(early) == len(ready):
            names.append(cluster.submit(*late))
    return [outputs[name] for name in names]


def decode_gaps_s(
    steps: Mapping[str, Sequence[StepRecord]], request_id: str, begin: float, end: float
) -> list[float]:
    """Seconds between the decode tokens of a request, of those gaps that ended between `begin` and `end`.

    Args:
        steps: of every worker, as `Cluster.steps` returns them; same clock as `begin` and `end`
    """
    times = sorted(
        step.end
        for each in steps.values()
        for step in each
        if any(key.startswith(f"{request_id}/") and decode for key, _, decode in step.chunks)
    )
    return [later - earlier for earlier, later in itertools.pairwise(times) if begin < later <= end]
