"""Every check passes the reference and other right versions, and fails every wrong one with a useful message."""

from __future__ import annotations

import inspect
import signal
from typing import Any

import pytest

from nanopd_lab import lab
from nanopd_lab.lab.checking import call, compact, expect, same
from tests.lab.wrong_versions import RIGHT, WRONG
from tests.lab.wrong_versions.base import CudaVersion, Version

# Exercises whose counterexamples hold all inputs, and the result as it is; others describe them.
SAY_ALL = {"kv.blocks_for", "engine.plan_chunks", "engine.choose_victim"}
SAY_ALL |= {"cost.arithmetic_intensity", "cost.time_per_output_token"}
SAY_ALL |= {"transfer.chunk_arrivals", "cluster.missing_blocks"}
SAY_ALL |= {"cost.features", "cost.fit_terms"}
NAMES = [exercise.name for exercise in lab.all_exercises()]


def id_of(value: Any) -> str | None:
    """A version's name; what pytest makes of it otherwise."""
    return getattr(value, "__name__", None)


def stub_of(reference: Any) -> Version:
    """What a learner starts from: the reference's signature and nothing in it."""
    if isinstance(reference, str):
        return CudaVersion("stub", '\n#error "your turn"\n')

    def stub(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("your turn")

    if inspect.isclass(reference):
        methods = {name: stub_of(each) for name, each in vars(reference).items() if inspect.isfunction(each)}
        return type("Stub", (), methods)
    stub.__signature__ = inspect.signature(reference)  # type: ignore[attr-defined]
    return stub


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_passes_and_cases_were_compared(name: str) -> None:
    exercise = lab.find(name)
    assert exercise.check(exercise.reference) >= 100
    assert lab.examine(name, exercise.reference).status is lab.Status.PASS


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_is_todo(name: str) -> None:
    report = lab.examine(name, stub_of(lab.find(name).reference))
    assert report.status is lab.Status.TODO
    assert report.counterexample is None
    assert f'lab.hint("{name}", 1)' in str(report)


@pytest.mark.parametrize("name", NAMES)
def test_there_are_enough_wrong_versions(name: str) -> None:
    assert len(WRONG[name]) >= 3
    assert len(RIGHT[name]) >= 2


@pytest.mark.parametrize(
    ("name", "impl"), [(name, impl) for name in NAMES for impl in RIGHT[name]], ids=id_of
)
def test_another_right_version_passes(name: str, impl: Version) -> None:
    assert lab.examine(name, impl).status is lab.Status.PASS


@pytest.mark.parametrize(
    ("name", "impl", "words"),
    [(name, impl, words) for name in NAMES for impl, words in WRONG[name]],
    ids=id_of,
)
def test_a_wrong_version_fails_and_is_told_why(name: str, impl: Version, words: str) -> None:
    report = lab.examine(name, impl)
    assert report.status is lab.Status.FAIL
    found = report.counterexample
    assert found is not None
    assert words in str(report)
    assert found.want != found.got
    # The counterexample is real: the reference gives what was wanted, the wrong version what was got.
    plain = found.want not in ("an answer", "a list of its own") and not found.want.endswith(" as it was")
    if name in SAY_ALL and plain:
        assert compact(lab.find(name).reference(**found.inputs)) == found.want
    assert len(str(report)) < 900
    assert all(len(line) < 200 for line in str(report).splitlines())


def test_a_hole_in_one_branch_is_todo_and_a_mistake_before_it_is_not_hidden() -> None:
    def only_exact(tokens: int, block_size: int) -> int:
        if tokens % block_size:
            raise NotImplementedError
        return tokens // block_size

    def wrong_then_hole(tokens: int, block_size: int) -> int:
        if tokens > 3:
            raise NotImplementedError
        return 7

    assert lab.examine("kv.blocks_for", only_exact).status is lab.Status.TODO
    assert lab.examine("kv.blocks_for", wrong_then_hole).status is lab.Status.FAIL


def test_an_error_names_the_learners_own_line() -> None:
    report = lab.examine("engine.plan_chunks", breaks)
    assert report.counterexample is not None
    assert report.counterexample.where.startswith("breaks, line ")
    assert "prefills[99]" in report.counterexample.where


def breaks(num_decodes: int, prefills: list[int], budget: int) -> list[int]:
    return [prefills[99]]


def test_a_bare_except_does_not_get_round_the_time_limit() -> None:
    def stubborn(tokens: int) -> int:
        while True:
            try:
                while True:
                    tokens += 1
            except Exception:
                tokens = 0

    with pytest.raises(lab.Counterexample, match="never ends"):
        call(stubborn, tokens=1, limit_s=0.2)


def test_the_time_limit_gives_back_the_timer_it_found() -> None:
    before = signal.getitimer(signal.ITIMER_REAL)[0]
    call(lambda tokens: tokens, tokens=1)
    after = signal.getitimer(signal.ITIMER_REAL)[0]
    assert (before == 0) == (after == 0)


def test_tensors_are_compared_and_shown_by_value() -> None:
    torch = pytest.importorskip("torch")
    left, right = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])
    assert same([left], [right])
    assert not same([left], [torch.tensor([1.0, 2.0])])

    def scales(x: Any) -> Any:
        x *= 2
        return x

    with pytest.raises(lab.Counterexample, match=r"x = Tensor\[2\] \[2, 4\] afterwards"):
        call(scales, x=torch.tensor([1.0, 2.0]))
    assert call(scales, x=torch.tensor([1.0, 2.0]), may_change=("x",)).tolist() == [2.0, 4.0]
    call(lambda n: torch.zeros(n), n=3)
    with pytest.raises(lab.Counterexample, match=r"got   Tensor\[3\]"):
        expect(False, "zeros", want=1)
