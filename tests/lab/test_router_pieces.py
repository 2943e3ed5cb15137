"""Every piece that an exercise hands to a router really routes, in the simulator and in the engine's cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanopd_lab import Cluster, ClusterConfig, SamplingParams, lab
from nanopd_lab.cost.hardware import load_model
from nanopd_lab.lab import Session, Status
from nanopd_lab.router import Outlook, Role, Slo
from nanopd_lab.router.pair_rule import ByEstimate, RouterParts
from nanopd_lab.sim import CostTime, SimConfig, Simulator, Veiled
from nanopd_lab.sim.workload import AZURE_LIKE, poisson_arrivals
from tests.lab.wrong_versions import RIGHT, WRONG

PIECES = [exercise.name for exercise in lab.all_exercises() if exercise.router_plug]
COST = load_model("h100-qwen3-8b")
OUTLOOK = Outlook.of(COST, Slo(0.4, 0.012))
REQUESTS = poisson_arrivals(60, 40.0, AZURE_LIKE, seed=1)


def routes(parts: RouterParts) -> list[str]:
    policy = Veiled(ByEstimate(OUTLOOK, parts))
    config = SimConfig(num_blocks=20_000)
    result = Simulator(policy, [Role.MIXED] * 3, CostTime(COST.iteration), REQUESTS, config).run()
    assert result.problems() == []
    return [record.route for record in result.records]


@pytest.fixture(scope="module")
def expected() -> list[str]:
    found = routes(RouterParts())
    assert len(set(found)) > 3
    return found


def test_these_are_the_pieces() -> None:
    assert len(PIECES) == 3
    assert all(lab.find(name).notebook == "08" for name in PIECES)


@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name in PIECES for impl in RIGHT[name]])
def test_a_piece_routes(name: str, impl: Any, expected: list[str], tmp_path: Path) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return impl(*args)

    session = Session(mode="learner", folder=tmp_path)
    session.exercise(name, impl)
    with pytest.warns(UserWarning, match="so the router gets the package's own"):
        assert session.router_parts() == RouterParts()
    report = session.check(name)
    assert report.status is Status.PASS
    assert "lab.router_parts() carries yours into the router." in str(report)
    session._attempts[name].impl = counted
    found = routes(session.router_parts())
    assert calls
    if impl is not RIGHT["router.rule"][1]:  # which decides otherwise between equals
        assert found == expected


def test_all_pieces_together_are_kept_and_come_back(expected: list[str], tmp_path: Path) -> None:
    session = Session(mode="learner", folder=tmp_path / "kept")
    for name in PIECES:
        session.exercise(name, RIGHT[name][0])
        session.check(name)
    assert routes(session.router_parts()) == expected
    session.save()
    again = Session(mode="learner", folder=tmp_path / "kept")
    assert again.load() == "\n".join(f"PASS  {name}" for name in sorted(PIECES))
    assert routes(again.router_parts()) == expected
    assert Session(mode="reference").router_parts() == RouterParts()


def test_a_wrong_piece_would_really_have_routed_worse(expected: list[str]) -> None:
    queueless = WRONG["router.ttft"][0][0]
    assert routes(RouterParts(ttft=queueless)) != expected


def test_a_rule_routes_the_real_cluster() -> None:
    taken = []

    def spy(job: Any, workers: Any, estimate: Any, slo: Any) -> Any:
        taken.append(lab.find("router.rule").reference(job, workers, estimate, slo))
        return taken[-1]

    policy = ByEstimate(OUTLOOK, RouterParts(rule=spy))
    config = ClusterConfig("random:tiny", workers=3, policy=policy, launcher="inline")
    with Cluster(config) as cluster:
        prompts = [list(range(2, 2 + length)) for length in (30, 9, 50, 17)]
        outputs = cluster.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
        cluster.check_integrity()
    assert [output.paths[0].route for output in outputs] == taken
    assert policy.predictor.predict(1, 100).quantile(0.5) < 148  # it has learnt from short outputs
