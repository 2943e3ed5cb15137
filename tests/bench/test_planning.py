"""Plans: what is simulated, what is recommended, what is refused. Small clusters, as a plan simulates often."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from nanopd_lab.bench.plan_report import advice, plan_record
from nanopd_lab.bench.planning import Plan, UnreachableError
from nanopd_lab.bench.workload import Fixed, Workload, random_workload
from nanopd_lab.cli import main
from nanopd_lab.router import Slo
from nanopd_lab.sim import CostTime, LinkModel, SimConfig
from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.sim.machine import Machine
from nanopd_lab.sim.workload import SimRequest
from tests.router.test_plan import H100

assert H100.transfer is not None
MACHINE = Machine(
    "an H100",
    "qwen3-8b",
    CostTime(H100.iteration),
    SimConfig(
        num_blocks=20_000,
        max_num_seqs=256,
        block_bytes=2_359_296,
        link=LinkModel(H100.transfer.setup_s, 0.0, H100.transfer.bytes_per_s),
        ahead=True,
    ),
    H100.iteration,
)


def requests(prompt: int = 1024, output: int = 64, count: int = 100) -> Workload:
    return random_workload(count, Arrivals(), (Fixed(prompt), Fixed(output)))


def test_a_simulation_ends_within_what_was_promised_and_near_the_formula() -> None:
    plan = Plan.make(MACHINE, requests(), Slo(0.15, 0.012), gpus=3)
    best = plan.forecasts[0].layout.policy
    plan.simulate([best])
    found = plan.simulated[best]
    assert found.attainment >= 0.9
    assert found.rate == pytest.approx(plan.forecasts[0].rate, rel=0.15)
    # It was the highest: a little above, fewer are in time.
    assert plan._serve(best, found.rate * 1.1).attainment < 0.9
    assert plan.best == best
    assert f"Take {best}: {found.rate:.4g} requests/s simulated" in advice(plan)


def test_where_no_queue_breaks_a_promise_the_rate_is_what_is_completed() -> None:
    """A time per token only is kept at any rate: the search went on to a million requests a second."""
    plan = Plan.make(MACHINE, requests(), Slo(tpot_s=0.1), gpus=2)
    plan.simulate(["collocated"])
    found, forecast = plan.simulated["collocated"], plan.forecast_of("collocated")
    assert forecast is not None
    assert found.attainment >= 0.9
    assert found.rate == pytest.approx(forecast.rate, rel=0.15)
    assert found.rate == pytest.approx(plan._serve("collocated", 4 * found.rate).completed_per_s, rel=0.05)


def test_at_a_given_rate_the_shares_in_time_are_compared() -> None:
    plan = Plan.make(MACHINE, requests(), Slo(0.15, 0.012), gpus=2, rate=12.0)
    assert [each.rate for each in plan.forecasts] == [12.0, 12.0]
    plan.simulate(plan.candidates(2))
    assert set(plan.simulated) == {"collocated", "1p1d"}
    for policy, found in plan.simulated.items():
        forecast = plan.forecast_of(policy)
        assert forecast is not None
        assert found.rate == 12.0
        assert found.attainment == pytest.approx(forecast.attainment, abs=0.1)
        assert found.tpot_ms == pytest.approx(1e3 * forecast.tpot_s, rel=0.1)
    assert "it would do for" in advice(plan)


def test_too_few_gpus_are_told_how_many_would_do() -> None:
    plan = Plan.make(MACHINE, requests(), Slo(0.15, 0.012), gpus=2, rate=150.0)
    text = advice(plan)
    assert "2 GPUs are too few" in text
    number = re.search(r"by formula (\d+) GPUs would do", text)
    assert number is not None
    gpus = int(number[1])
    assert plan.planner.search(gpus, 150.0)[0].attainment >= 0.9
    assert plan.planner.search(gpus - 1, 150.0)[0].attainment < 0.9


def test_a_trace_keeps_its_own_times_faster_or_slower() -> None:
    burst = [SimRequest(f"r{n}", 10.0 * (n // 10) + 0.1, 256, 8) for n in range(40)]
    plan = Plan.make(MACHINE, Workload(tuple(burst), "trace"), Slo(0.5, 0.05), gpus=1)
    assert plan._requests(2 * plan.workload.request_rate)[10].arrival == pytest.approx(10.1 / 2)


@pytest.mark.parametrize(
    ("slo", "name"),
    [(Slo(0.02, 0.1), "ttft:20"), (Slo(1.0, 0.004), "tpot:4"), (Slo(1.0, 0.1, 0.3), "e2el:300")],
)
def test_an_objective_below_the_time_of_a_request_alone_is_named(slo: Slo, name: str) -> None:
    with pytest.raises(
        UnreachableError, match=rf"^{name} cannot be met: .* ms with nobody else there, \d+% more"
    ):
        Plan.make(MACHINE, requests(), slo, gpus=2)


def test_no_objective_and_no_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="--goodput ttft:500"):
        Plan.make(MACHINE, requests(), Slo(), gpus=2)
    with pytest.raises(ValueError, match="at least 1"):
        Plan.make(MACHINE, requests(), Slo(1.0, 1.0), gpus=0)


def test_a_thousand_gpus_by_formula() -> None:
    plan = Plan.make(MACHINE, requests(), Slo(0.15, 0.012), gpus=1000)
    eight = Plan.make(MACHINE, requests(), Slo(0.15, 0.012), gpus=8)
    assert plan.forecasts[0].rate / 1000 > eight.forecasts[0].rate / 8
    assert plan.forecasts[0].rate < 1000 / eight.planner.times.beside(0).full.mean()


# ---- the command -----------------------------------------------------------------------------------------


def test_the_command_writes_tables_advice_and_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    flags = "--gpus 2 --goodput ttft:150 tpot:12 --random-output-len 32 --num-prompts 100 --simulate 1"
    assert main(["plan", *flags.split(), "--policies", "least-loaded", "--result-filename", str(file)]) == 0
    out = capsys.readouterr().out
    assert "modelled: 2 GPUs of h100, qwen3-8b" in out
    record: dict[str, Any] = json.loads(file.read_text())
    assert record["schema"] == "nanopd-lab/plan/1"
    assert record["provenance"]["command"]
    assert record["advice"] in out
    assert len(record["by_formula"]) == 2
    assert {each["policy"] for each in record["simulated"]} >= {"collocated", "least-loaded"}
    assert record["recommended"] == record["simulated"][0]["policy"]
    assert all(math.isfinite(each["rate"]) for each in record["by_formula"])


def test_the_command_at_a_rate_by_formula_only(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--gpus 8 --goodput ttft:300 tpot:20 --dataset-name azure-like --request-rate 40 --simulate 0"
    assert main(["plan", *flags.split()]) == 0
    out = capsys.readouterr().out
    assert "40 requests/s" in out
    assert "simulated" not in out
    assert "by formula" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--goodput ttft:10", "ttft:10 cannot be met"),
        ("", "give one, as --goodput"),
        ("--goodput ttft:300 --gpus 0", "at least 1"),
        ("--goodput ttft:300 --attainment 90", "0.9, not 90"),
        ("--goodput ttft:300 --policies nonsense --num-prompts 10 --simulate 0", "unknown policy"),
    ],
)
def test_the_command_refuses_with_a_way_out(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_record_is_json() -> None:
    plan = Plan.make(MACHINE, requests(output=1), Slo(ttft_s=0.15), gpus=2, rate=1e4)
    json.dumps(plan_record(plan), allow_nan=False)
