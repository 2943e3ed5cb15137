"""Rates, objectives and splits that are derived do what they are derived for; profiles of several processes are one."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from nanopd_lab.bench.workload import Uniform, Workload, random_workload
from nanopd_lab.cost.files import CostModel
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.measure import merged
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.demo.plan import Machine, Unloaded, best_split, telling_rate
from nanopd_lab.demo.predict import MAP_RATES, VARIANTS, pays_map, predicted, stretched
from nanopd_lab.demo.strategies import cluster_policy, default_policies
from nanopd_lab.router import Slo
from nanopd_lab.router.registry import ESTIMATING
from nanopd_lab.router.veil import Veiled
from nanopd_lab.sim import SimConfig
from nanopd_lab.sim.arrivals import Arrivals

ERRORS = {"held_out": {"mean": 0.05, "maximum": 0.1, "count": 4}}


def cost_model() -> CostModel:
    model = IterationModel(0.004, 0.0, 0.0005, 0.0, 1e-6, 0.0)
    fit = {"block_bytes": 8192, "block_size": 16, "errors": ERRORS}
    return CostModel("random:tiny", "a test", model, TransferModel(0.001, 0.0, 1e9), None, fit)


def make(rate: float, count: int) -> Workload:
    return random_workload(count, Arrivals(rate), (Uniform(20, 120), Uniform(2, 30)), seed=3)


def machine(workers: int = 2) -> Machine:
    return Machine.of(cost_model(), workers, SimConfig(num_blocks=500, max_num_batched_tokens=64))


def test_at_the_telling_rate_the_best_strategy_begins_to_fail() -> None:
    two = machine()
    slo = Unloaded.of(two, make(1.0, 100)).objectives()
    rate = telling_rate(two, ["collocated", "1p1d"], make, slo, share=0.7)
    requests = make(rate, 240).requests
    found = max(two.simulate(policy, requests, slo).attainment(slo) for policy in ("collocated", "1p1d"))
    assert found == pytest.approx(0.7, abs=0.06)
    assert rate == float(f"{rate:.2g}")


def test_objectives_are_an_idle_workers_times() -> None:
    found = Unloaded.of(machine(), make(1.0, 400))
    assert found.prompt_tokens == pytest.approx(70, abs=4)
    model = machine().cost.iteration
    alone = machine().simulate("collocated", make(1e-3, 1).requests, Slo()).records[0]
    assert alone.ttft_s is not None
    assert alone.tpot_s is not None
    one = Unloaded.of(machine(), make(1e-3, 1))
    assert one.ttft_s == pytest.approx(alone.ttft_s, rel=0.02)
    assert one.tpot_s == pytest.approx(alone.tpot_s, rel=0.02)
    slo = found.objectives()
    assert slo.ttft_s == pytest.approx(4 * found.ttft_s, rel=0.05)
    assert slo.tpot_s == pytest.approx(1.5 * model.decode_seconds(1, 78), rel=0.05)
    assert math.isinf(slo.e2e_s)


def test_the_best_split_is_the_best_of_all() -> None:
    four, slo = machine(4), Slo(0.1, 0.012)
    rate = 25.0
    requests = make(rate, 240).requests
    shares = {name: four.simulate(name, requests, slo).attainment(slo) for name in ("1p3d", "2p2d", "3p1d")}
    assert shares[best_split(four, make, rate, slo)] == max(shares.values())
    assert best_split(machine(2), make, rate, slo) == "1p1d"
    with pytest.raises(ValueError, match="2 workers or more"):
        best_split(machine(1), make, rate, slo)


def test_the_map_compares_the_same_requests() -> None:
    two, slo = machine(), Slo(0.1, 0.012)
    found = pays_map(two, "1p1d", make, 10.0, slo, 60)
    assert [len(row) for row in found.gain] == [len(MAP_RATES)] * len(VARIANTS)
    load = stretched(make(found.rates[2], 60), 2.0, 1.0)
    shares = [two.simulate(name, load.requests, slo).attainment(slo) for name in ("1p1d", "collocated")]
    assert found.gain[list(VARIANTS).index("prompts twice as long")][2] == pytest.approx(
        shares[0] - shares[1]
    )


def test_what_is_predicted_is_called_modelled() -> None:
    result = predicted(machine(), "1p1d", make(10.0, 30), Slo(0.1, 0.012))
    assert "modelled" in result["backend"]
    assert result["pd"]["disaggregated"] == result["completed"] == 30


def test_policies_that_estimate_do_not_see_lengths() -> None:
    two = machine()
    for name in ESTIMATING:
        assert isinstance(cluster_policy(name, 2, two.cost, Slo(0.1, 0.01), 64), Veiled)
    assert cluster_policy("1p1d", 2, two.cost, Slo(), 64) == "1p1d"
    assert default_policies("1p1d")[:2] == ("collocated", "1p1d")


def test_profiles_of_several_processes_are_one() -> None:
    point = {"kind": "decode", "chunks": [[1, 64, 1]], "seconds": [0.1, 0.3, 0.2]}
    first = {"points": [point], "settings": {"threads": 1}, "transfers": []}
    second = {"points": [{**point, "seconds": [0.4, 0.5, 0.6]}], "settings": {"threads": 1}}
    found = merged([first, second])
    assert found["points"][0]["seconds"] == [0.1, 0.3, 0.2, 0.4, 0.5, 0.6]
    assert found["settings"]["processes"] == 2
    assert found["transfers"] == []
    assert first["points"][0]["seconds"] == [0.1, 0.3, 0.2]
    other = {**second, "points": [{**point, "chunks": [[1, 65, 1]]}]}
    with pytest.raises(ValueError, match="different steps"):
        merged([first, other])


def test_blocks_and_links_are_the_cost_models() -> None:
    found = Machine.of(replace(cost_model(), transfer=None), 2, SimConfig())
    assert found.config.block_bytes == 8192
    assert machine().config.link.bytes_per_s == 1e9
