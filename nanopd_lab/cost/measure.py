"""A cost model of this machine in about a minute: a profile by as many processes at once as there will be workers.

Workers on a CPU share its memory and caches; a step that is timed alone is shorter than it will be. So all of them
profile at the same time, and a step's time is the median of their visits. In between one of them times a few of the
steps alone, and while the others do something else, as workers are not always all busy with the same (`cost.company`).
A GPU is alone: one process is enough.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from nanopd_lab.cost.calibrate import fit_profile, own_link
from nanopd_lab.cost.company import Company, Timed
from nanopd_lab.cost.files import CostModel, read_json
from nanopd_lab.cost.grid import Grid, grid_for
from nanopd_lab.starting import process_context, take_environment

CPU_GRID = Grid((16, 48, 112, 224), (0, 256), (1, 2, 4, 8), (64, 400), 12)
TINY_GRID = Grid((4, 16), (0, 16), (1, 3), (8, 32), 6)


@dataclass(frozen=True)
class ProfileJob:
    """What is profiled.

    processes, threads: on a CPU: as many as there will be workers, and of each
    """

    model: str
    device: str
    dtype: str
    compilation: str
    processes: int
    threads: int
    grid: Grid

    @classmethod
    def of(
        cls, model: str, cuda: bool, dtype: str, compilation: str, workers: int, threads: int, tiny: bool
    ) -> ProfileJob:
        """With the grid for the device, or the smallest one."""
        grid = TINY_GRID if tiny else grid_for("cuda", quick=True) if cuda else CPU_GRID
        processes = 1 if cuda else workers
        return cls(model, "cuda:0" if cuda else "cpu", dtype, compilation, processes, threads, grid)


def measure_cost_model(job: ProfileJob, folder: Path, progress: bool = True) -> CostModel:
    """Profile and fit; `cost-model.json` stays in the folder.

    Raises:
        RuntimeError: a process that profiles has failed; its last words are in the message.
        ValueError: as of `profile` and `fit_profile`.
    """
    files = [folder / f"profile-{number}.json" for number in range(job.processes)]
    _run(job, files, progress)
    record = merged([read_json(path) for path in files])
    for path in files:
        path.unlink()
    cost = fit_profile(record, own_link(record))
    if job.processes > 1:
        cost = with_company(cost, record)
    cost.save(folder / "cost-model.json")
    return cost


def some_of(grid: Grid) -> Grid:
    """Few of its steps: prompts and batches of each size with the shortest past."""
    return replace(grid, pasts=grid.pasts[:1], contexts=grid.contexts[:1], num_mixed=0)


def with_company(cost: CostModel, profile: Mapping[str, Any]) -> CostModel:
    """What workers cost one another, from steps that were timed in every company; noted in `fit`.

    Args:
        profile: of processes that were busy with the same, which `cost` is fitted to, with what `Together` adds

    Raises:
        ValueError: see `Company.fit`.
    """
    rows = profile["company"]
    timed: dict[str, list[Timed]] = {"decode": [], "prefill": []}
    for row in rows:
        own, other = (row[kind] for kind in sorted(timed, key=lambda kind: kind != row["kind"]))
        timed[row["kind"]] += zip(row["alone"], own, other, strict=True)
    company = Company.fit(int(profile["settings"]["processes"]), timed["decode"], timed["prefill"])
    return replace(cost, company=company, fit={**cost.fit, "company": rows})


def merged(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One profile of several of the same steps: the visits of all; the pulls of the first.

    Raises:
        ValueError: they are not of the same steps.
    """
    first = dict(records[0])
    rows = []
    for number, row in enumerate(first["points"]):
        others = [record["points"][number] for record in records]
        if any(other["chunks"] != row["chunks"] for other in others):
            raise ValueError("the profiles are of different steps; make them with one grid")
        rows.append({**row, "seconds": [second for other in others for second in other["seconds"]]})
    first["points"] = rows
    first["settings"] = {**first["settings"], "processes": len(records)}
    return first


def _run(job: ProfileJob, files: Sequence[Path], progress: bool) -> None:
    """A process for each file, all at once; the first times some steps in other company, too."""
    for path in files:
        path.unlink(missing_ok=True)  # of an earlier run, which may have had other neighbours
        path.with_suffix(".log").unlink(missing_ok=True)
    context = process_context([job.device])
    barrier = context.Barrier(len(files)) if len(files) > 1 else None
    processes = [
        context.Process(
            target=_profile_one, args=(job, path, barrier, progress and path is files[0], dict(os.environ))
        )
        for path in files
    ]
    for process in processes:
        process.start()
    try:
        running: dict[Any, BaseProcess] = {process.sentinel: process for process in processes}
        while running:
            for sentinel in wait(list(running)):
                ended = running.pop(sentinel)
                ended.join()
                if ended.exitcode and barrier is not None:
                    barrier.abort()  # the others would wait for it
    except BaseException:
        for process in processes:
            process.terminate()
            process.join()
        raise
    if failed := [process for process in processes if process.exitcode]:
        logs = [path.with_suffix(".log") for path in files]
        words = [line for log in logs if log.exists() for line in log.read_text().strip().splitlines()[-1:]]
        raise RuntimeError(f"profiling {job.model} failed: {words[0] if words else failed[0].exitcode}")


def _profile_one(
    job: ProfileJob, path: Path, barrier: Barrier | None, progress: bool, environment: Mapping[str, str]
) -> None:
    """In a process of its own."""
    take_environment(environment)
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    import torch

    from nanopd_lab.cost.profile import Together, profile

    torch.set_num_threads(job.threads)
    first = path.stem.endswith("-0")
    try:
        profile(
            job.model,
            device=job.device,
            dtype=job.dtype,
            compilation=job.compilation,
            result=path,
            grid=job.grid,
            transfers=first,
            together=Together(barrier, some_of(job.grid), first) if barrier else None,
            progress=progress,
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenBarrierError:
        sys.exit(1)  # because another one has failed, which says why
    except Exception as error:  # for the one who waits
        path.with_suffix(".log").write_text(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
