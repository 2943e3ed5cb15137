"""Every piece that an exercise hands to a cost model really makes it, and gives the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nanopd_lab import lab
from nanopd_lab.cost.calibrate import CostParts, engine_samples, fit_profile, recorded_profile
from nanopd_lab.lab import Session, Status
from nanopd_lab.viz.breakdown import recorded_engine
from tests.lab.wrong_versions import RIGHT, WRONG

PIECES = [exercise.name for exercise in lab.all_exercises() if exercise.cost_plug]


def test_these_are_the_pieces() -> None:
    assert len(PIECES) == 3
    assert all(lab.find(name).notebook == "07" for name in PIECES)


@pytest.mark.parametrize(("name", "impl"), [(name, impl) for name in PIECES for impl in RIGHT[name]])
def test_a_piece_makes_the_model(name: str, impl: Any, tmp_path: Path) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return impl(*args)

    session = Session(mode="learner", folder=tmp_path)
    session.exercise(name, impl)
    with pytest.warns(UserWarning, match="so the cost model gets the package's own"):
        assert session.cost_parts() == CostParts()
    assert session.check(name).status is Status.PASS
    assert impl in vars(session.cost_parts()).values()
    assert ("07", name, "PASS", "yours, in the cost model") in session.progress().rows

    profile = recorded_profile("cpu")
    assert profile is not None
    expected = fit_profile(profile)
    plug = lab.find(name).cost_plug
    assert plug is not None
    found = fit_profile(profile, parts=plug(CostParts(), counted))
    assert calls
    errors = [cost.fit["errors"]["held_out"] for cost in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert found.iteration.token_s == pytest.approx(expected.iteration.token_s, rel=1e-3)


def test_a_wrong_piece_does_not_get_in(tmp_path: Path) -> None:
    session = Session(mode="learner", folder=tmp_path)
    session.exercise("cost.fit_terms", WRONG["cost.fit_terms"][0][0])
    with pytest.raises(lab.CheckFailedError):
        session.check("cost.fit_terms")
    assert session.cost_parts() == CostParts()


def test_records_of_the_notebook() -> None:
    assert recorded_profile("no such device") is None
    assert recorded_profile("cpu", cuda_graphs=False) is None
    [first, *_, prompt] = engine_samples(recorded_engine(), "eager")
    assert (first.step.tokens, first.step.context) == (1, 513)
    assert (prompt.step.tokens, prompt.step.context) == (2048, 2048)
    assert 0.04 < first.seconds < 0.06
    with pytest.raises(ValueError, match="no mode 'fast'; it has"):
        engine_samples(recorded_engine(), "fast")
