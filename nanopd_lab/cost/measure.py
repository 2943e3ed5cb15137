"""A cost model of this machine in under a minute: a profile by as many processes at once as there will be workers.

Workers on a CPU share its memory and caches; a step that is timed alone is shorter than it will be. So all of them
profile at the same time, and a step's time is the median of their visits. A GPU is alone: one process is enough.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopd_lab.cluster.starting import process_context, take_environment
from nanopd_lab.cost.calibrate import fit_profile, own_link
from nanopd_lab.cost.files import CostModel, read_json
from nanopd_lab.cost.grid import Grid, grid_for

CPU_GRID = Grid((16, 64, 160), (0, 256), (1, 3, 8), (64, 400), 12)
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
    """Profile and fit; `profile.json` and `cost-model.json` stay in the folder.

    Raises:
        RuntimeError: a process that profiles has failed; its last words are in the message.
        ValueError: as of `profile` and `fit_profile`.
    """
    files = [folder / f"profile-{number}.json" for number in range(job.processes)]
    for path in files:
        path.unlink(missing_ok=True)  # of an earlier run, which may have had other neighbours
    context = process_context([job.device])
    processes = [
        context.Process(
            target=_profile_one, args=(job, path, progress and path is files[0], dict(os.environ))
        )
        for path in files
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except BaseException:
        for process in processes:
            process.terminate()
            process.join()
        raise
    for process, path in zip(processes, files, strict=True):
        if process.exitcode:
            words = path.with_suffix(".log").read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"profiling {job.model} failed: {words[0] if words else process.exitcode}")
    record = merged([read_json(path) for path in files])
    for path in files:
        path.unlink()
        path.with_suffix(".log").unlink(missing_ok=True)
    cost = fit_profile(record, own_link(record))
    cost.save(folder / "cost-model.json")
    return cost


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


def _profile_one(job: ProfileJob, path: Path, progress: bool, environment: Mapping[str, str]) -> None:
    """In a process of its own."""
    take_environment(environment)
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    import torch

    from nanopd_lab.cost.profile import profile

    torch.set_num_threads(job.threads)
    try:
        profile(
            job.model,
            device=job.device,
            dtype=job.dtype,
            compilation=job.compilation,
            result=path,
            grid=job.grid,
            transfers=path.stem.endswith("-0"),
            progress=progress,
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # for the one who waits
        path.with_suffix(".log").write_text(f"{type(error).__name__}: {error}\n")
        sys.exit(1)
