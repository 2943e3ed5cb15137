"""The same requests through the same workers, one strategy after another; what was measured is kept, come what may."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanopd_lab.bench.load import Report
from nanopd_lab.bench.serving import bench_cluster
from nanopd_lab.bench.steps_pace import pace_of, shows_pace, works_of
from nanopd_lab.bench.workload import Workload
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.cost.files import CostModel
from nanopd_lab.router import Policy, Slo

Result = dict[str, Any]
Progress = Callable[[str], AbstractContextManager[Report]]


class Workers:
    """A cluster that stays for all strategies, and is started anew only where it has to be.

    Args:
        config: its policy is not looked at
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self.starts = 0

    def under(self, policy: str | Policy) -> Cluster:
        """The cluster, idle, with this policy. Raises ValueError: as of `ClusterConfig`."""
        if self._cluster is not None:
            try:
                self._cluster.use_policy(policy)
                return self._cluster
            except (ValueError, RuntimeError):  # requests that hang, a worker that is gone
                self.close()
        self._cluster = self._stack.enter_context(Cluster(replace(self._config, policy=policy)))
        self.starts += 1
        return self._cluster

    def close(self) -> None:
        """Stop the workers."""
        self._cluster = None
        self._stack.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def measure(
    workers: Workers,
    policies: Mapping[str, Callable[[], str | Policy]],
    cost: CostModel,
    workload: Workload,
    slo: Slo,
    folder: Path,
    report: Progress | None = None,
) -> Iterator[Result]:
    """A detailed result a strategy, written to `measured-<policy>.json` as soon as it is there; partial ones too. Ends
    after an interrupt; a cluster that is lost is started again for the next strategy.

    Args:
        workers: record their steps, if these show a pace
        policies: what makes each, by name
        cost: of a whole run `pd.pace` says how many times as long as by this model its steps took, if these show
        report: makes of a policy's name a context whose value is told how its run goes

    Raises:
        ValueError: as of `bench_cluster`.
    """
    for policy, create in policies.items():
        cluster = workers.under(create())
        cluster.steps()  # those of before are thrown away
        with report(policy) if report else nullcontext() as told:
            result = bench_cluster(cluster, workload, slo, detailed=True, report=told, drain_s=60.0)
        result["pd"]["policy"] = policy  # as it was asked for, whatever it calls itself
        if shows_pace(cost) and not result["partial"] and (works := works_of(cluster.steps(), cost.company)):
            result["pd"]["pace"] = pace_of(works, cost.iteration)._asdict()
        write_json(folder / f"measured-{policy}.json", result)
        yield result
        if result["pd"].get("interrupted") == "interrupted":
            return


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Beside it and moved, so that there is always a whole file."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value) + "\n", encoding="utf-8")
    part.replace(path)
