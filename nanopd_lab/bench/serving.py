"""A workload through a cluster, and the result of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanopd_lab.bench.load import LoadOptions, Report, run_load
from nanopd_lab.bench.metrics import Selection
from nanopd_lab.bench.report import Setting, serving_result
from nanopd_lab.bench.workload import Workload
from nanopd_lab.router.slo import Slo

if TYPE_CHECKING:
    from nanopd_lab.cluster.cluster import Cluster


def setting_of(cluster: Cluster, label: str | None = None, max_concurrency: int | None = None) -> Setting:
    """What a result says about a cluster."""
    config = cluster.config
    policy = config.policy if isinstance(config.policy, str) else config.policy.name
    return Setting(
        config.model,
        config.workers,
        policy,
        config.model if cluster.tokenizer is not None else None,
        label,
        max_concurrency,
        {
            "launcher": config.launcher,
            "transport": config.transport,
            "devices": [str(device) for device in config.worker_devices()],
            "engine": dict(config.engine),
        },
    )


def bench_cluster(
    cluster: Cluster,
    workload: Workload,
    slo: Slo | None = None,
    selection: Selection | None = None,
    label: str | None = None,
    detailed: bool = False,
    report: Report | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Serve the workload and return the result; after an interrupt or the loss of the cluster it is a partial one.

    Args:
        options: as of `LoadOptions`

    Raises:
        ValueError: a setting is wrong, or the readiness request failed.
    """
    if not isinstance(workload, Workload):
        raise ValueError(f"the workload is {workload!r}; make one, as bench.workload.random_workload(...)")
    if slo is not None and not isinstance(slo, Slo):
        raise ValueError(f'slo is {slo!r}; give Slo(...), for example Slo.parse(["ttft:500", "tpot:100"])')
    load = LoadOptions(**options)
    run = run_load(cluster, workload, load, report)
    setting = setting_of(cluster, label, load.max_concurrency)
    return serving_result(run.records, workload, setting, slo, selection, run.interrupted, detailed)
