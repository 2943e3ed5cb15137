"""What workers on one host cost one another: the fit finds what was planted, and files keep it."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanopd_lab.cost.company import Company
from nanopd_lab.cost.files import CostModel
from nanopd_lab.cost.grid import Grid
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.measure import ProfileJob, measure_cost_model, some_of, with_company
from nanopd_lab.cost.profile import COMPANIES

MODEL = IterationModel(1e-3, 5e-3, 2e-5, 2e-8, 5e-8, 1e-5)
GRID = Grid((16, 64, 160), (0, 256), (1, 3, 8), (64, 400), 12)


def profile_of(company: Company, noise: float) -> dict[str, Any]:
    """Four visits of each step in each company, with log-normal noise, on a machine that slows down by a tenth each."""
    rng = np.random.default_rng(company.processes)
    parts = {
        "decode": {
            "alone": company.decode_alone, "decode": 1.0, "prefill": company.decode_beside_prompts
        },
        "prefill": {
            "alone": company.prompt_alone, "decode": company.prompt_beside_decodes, "prefill": 1.0
        },
    }  # fmt: skip
    rows = []
    for point in some_of(GRID).points(256, 1000, 2048, 16):
        times = {
            name: [
                MODEL.seconds(point.chunks) * part * 1.1**visit * rng.lognormal(0, noise)
                for visit in range(4)
            ]
            for name, part in parts[point.kind].items()
        }
        rows.append({**point.to_record(), **times})
    return {"settings": {"processes": company.processes}, "company": rows}


@pytest.mark.parametrize(("noise", "off"), [(0.0, 1e-9), (0.03, 0.05)])
@pytest.mark.parametrize("planted", [Company(2, 0.6, 0.7, 0.65, 1.2), Company(4, 0.3, 0.95, 0.8, 0.96)])
def test_planted_parts_are_found(planted: Company, noise: float, off: float) -> None:
    cost = with_company(CostModel("m", "d", MODEL, fit={"block_bytes": 1}), profile_of(planted, noise))
    assert cost.company is not None
    assert asdict(cost.company) == pytest.approx(asdict(planted), rel=off)
    assert len(cost.fit["company"]) == 6
    assert cost.fit["block_bytes"] == 1
    assert cost.iteration == MODEL


def test_few_steps_are_timed_in_other_company_too() -> None:
    few, all_of_them = (grid.points(256, 1000, 2048, 16) for grid in (some_of(GRID), GRID))
    assert {point.kind for point in few} == {"prefill", "decode"}
    assert len(few) == 6
    assert set(few) <= set(all_of_them)


def test_company_does_not_make_steps_faster() -> None:
    """Noise may say so; and one step that was disturbed does not decide."""
    found = Company.fit(2, [(1.1, 1.0, 0.9), (1.2, 1.0, 0.8), (0.1, 1.0, 5.0)], [(0.5, 1.0, 0.4)])
    assert found == Company(2, 1.0, 0.5, 1.0, 0.5)


def test_parts_and_processes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="company of 1 processes"):
        Company(1, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"prompt_alone is 1\.5; it is above 0 and at most 1"):
        Company(2, 0.5, 1.5)
    with pytest.raises(ValueError, match=r"prompt_beside_decodes is 0\.0; it is above 0 and finite"):
        Company(2, 0.5, 0.5, prompt_beside_decodes=0.0)
    with pytest.raises(ValueError, match="0 decode steps and 1 with prompts"):
        Company.fit(2, [], [(1.0, 2.0, 2.0)])


def test_a_file_keeps_it_and_one_without_still_loads(tmp_path: Path) -> None:
    cost = CostModel("m", "d", MODEL, company=Company(2, 0.6, 0.7, 0.8, 1.1))
    cost.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == cost
    without = {name: value for name, value in cost.to_record().items() if name != "company"}
    assert CostModel.from_record(without).company is None
    assert "company" not in CostModel("m", "d", MODEL).to_record()
    record = cost.to_record()
    record["company"]["decode_alone"] = 2.0
    with pytest.raises(ValueError, match=r"bad.json: decode_alone is 2\.0"):
        CostModel.from_record(record, "bad.json")
    record["company"] = {"processes": 2, "decode_alone": 0.6, "prompt_alone": 0.7}
    assert CostModel.from_record(record).company == Company(2, 0.6, 0.7), "as beside steps of the own kind"
    record["company"] = {"decode": 0.5}
    with pytest.raises(ValueError, match="unknown field 'decode'; Company has processes, decode_alone"):
        CostModel.from_record(record)


def test_one_that_dies_while_they_profile_holds_up_nobody(tmp_path: Path) -> None:
    job = ProfileJob.of("random:tiny", False, "float32", "off", 2, 1, tiny=True)
    with ThreadPoolExecutor(1) as pool:
        measured = pool.submit(measure_cost_model, job, tmp_path, progress=False)
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        multiprocessing.active_children()[0].kill()
        # -9, or 1: the other one has noticed first that it is alone.
        with pytest.raises(RuntimeError, match=r"profiling random:tiny failed: (-9|1)"):
            measured.result(timeout=120)
    assert not multiprocessing.active_children()


def test_a_cost_model_is_measured_in_every_company(tmp_path: Path) -> None:
    job = ProfileJob.of("random:tiny", False, "float32", "off", 2, 1, tiny=True)
    cost = measure_cost_model(job, tmp_path, progress=False)
    assert cost == CostModel.load(tmp_path / "cost-model.json")
    assert {each.name for each in tmp_path.iterdir()} == {"cost-model.json"}
    assert cost.company is not None
    assert len(cost.fit["company"]) == 4
    for row in cost.fit["company"]:
        assert [len(row[company]) for company in COMPANIES] == [4, 4, 4], "before and behind rounds"
        assert all(seconds > 0 for company in COMPANIES for seconds in row[company])
    single = measure_cost_model(replace(job, processes=1), tmp_path, progress=False)
    assert single.company is None
