"""The pace of a machine: of traces made by hand, and of a cluster whose plans are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from nanopd_lab import Cluster, ClusterConfig, SamplingParams
from nanopd_lab.bench.steps_pace import Pace, pace_of, shapes_of, works_of
from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.inline import InlineLauncher
from nanopd_lab.cost.company import Company
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.roofline import ChunkShape

MODEL = IterationModel(1e-3, 2e-2, 1e-3, 1e-6, 1e-6, 1e-5, vocab_share=0.3, mixed_s=2e-3, rows_s=1e-4)
# A prompt of 50 in two chunks, the second beside another's decode; its output on the other worker; another prompt.
TRACE = {
    "w1": [
        StepRecord(30.0, 32.0, (("a/0#0", 1, True),)),
        StepRecord(32.0, 34.0, (("a/0#0", 1, True), ("c/0#2", 5, False))),
    ],
    "w0": [
        StepRecord(1.0, 5.0, (("a/0#0", 32, False), ("b/0#1", 7, False))),
        StepRecord(6.0, 9.0, (("b/0#1", 1, True), ("a/0#0", 18, False))),
    ],
}
SHAPES = [
    [ChunkShape(32, 0, 0), ChunkShape(7, 0, 1)],
    [ChunkShape(1, 7, 1), ChunkShape(18, 32, 1)],
    [ChunkShape(1, 50, 1)],
    [ChunkShape(1, 51, 1), ChunkShape(5, 0, 1)],
]


def served(seconds: Callable[[list[ChunkShape]], float], noise: float = 0.0) -> dict[str, list[StepRecord]]:
    """Prompts on one worker, then their decodes on another; each step takes so long, times what is left to chance."""
    rng, now = random.Random(5), 0.0
    steps: dict[str, list[StepRecord]] = {"w0": [], "w1": []}
    for number in range(12):
        prompt, key = rng.randint(10, 200), f"r{number}/0#0"
        for count, past in [(prompt, 0)] + [(1, prompt + n) for n in range(15)]:
            took = seconds([ChunkShape(count, past, 1)]) * rng.lognormvariate(0, noise)
            steps["w1" if past else "w0"].append(StepRecord(now, now + took, ((key, count, past > 0),)))
            now += took + 1e-4
    return steps


@pytest.mark.parametrize("planted", [Pace(0.9, 1.2), Pace(1.4, 0.7), Pace()])
def test_planted_paces_are_found(planted: Pace) -> None:
    works = works_of(served(planted.of(MODEL).seconds))
    assert pace_of(works, MODEL) == pytest.approx(planted, rel=1e-6)


@pytest.mark.parametrize("company", [None, Company(2, 0.8, 0.9, 0.85, 1.05)])
def test_at_its_pace_each_kind_takes_what_it_took(company: Company | None) -> None:
    """All its steps together, of several runs."""
    runs = [served(MODEL.scaled(scale).seconds, noise=0.2) for scale in (0.9, 1.3)]
    works = [each for run in runs for each in works_of(run, company)]
    at_pace = pace_of(works, MODEL).of(MODEL)
    for decodes_only in (True, False):
        kind = [each for each in works if each.decodes_only is decodes_only]
        modelled = sum(at_pace.seconds(each.chunks) for each in kind)
        assert modelled == pytest.approx(sum(each.seconds for each in kind), rel=1e-6)


def test_steps_of_one_kind_have_one_pace() -> None:
    works = works_of({"w0": served(MODEL.seconds)["w0"]})
    assert pace_of(works, MODEL.scaled(0.5)) == pytest.approx((2.0, 2.0))


def test_chunks_are_those_of_the_steps() -> None:
    works = works_of(TRACE)
    assert [each.chunks for each in works] == SHAPES
    assert [each.seconds for each in works] == [4.0, 3.0, 2.0, 2.0]
    assert [each.decodes_only for each in works] == [False, False, True, False]


def test_what_begins_again_has_no_past() -> None:
    """A preempted try computes its prompt and its output once more; a new try is another key."""
    chunks = [("a/0#0", 10, False), ("a/0#0", 1, True), ("a/0#0", 8, False), ("a/0#0", 4, False)]
    chunks += [("a/0#0", 1, True), ("a/0#1", 13, False)]
    steps = [StepRecord(n, n + 1.0, (chunk,)) for n, chunk in enumerate(chunks)]
    assert [shape for shapes in shapes_of(steps) for shape in shapes] == [
        ChunkShape(10, 0, 1), ChunkShape(1, 10, 1), ChunkShape(8, 0, 0), ChunkShape(4, 8, 1), ChunkShape(1, 12, 1),
        ChunkShape(13, 0, 1),
    ]  # fmt: skip


def test_a_step_alone_counts_as_in_company() -> None:
    """As the simulator, which lets steps be faster while others rest, would else do so a second time."""
    company = Company(2, 0.5, 0.8, decode_beside_prompts=0.625, prompt_beside_decodes=1.25)
    steps = {
        "w0": [StepRecord(0.0, 4.0, (("a/0#0", 8, False),)), StepRecord(4.0, 6.0, (("a/0#0", 1, True),))],
        "w1": [StepRecord(3.0, 5.0, (("b/0#1", 1, True),))],
    }
    # a's prompt: 3 s alone and 1 s beside b's decode; its decode: 1 s beside b's and 1 s alone; b's: 1 s beside each.
    work_s = (3 / 0.8 + 1 / 1.25) + (1 + 1 / 0.5) + (1 / 0.625 + 1)
    assert sum(each.seconds for each in works_of(steps, company)) == pytest.approx(work_s)
    assert sum(each.seconds for each in works_of(steps)) == pytest.approx(4 + 2 + 2)


def test_no_steps_have_no_pace() -> None:
    with pytest.raises(ValueError, match="no step"):
        pace_of(works_of({"w0": [], "w1": []}), MODEL)
    with pytest.raises(ValueError, match=r"take 0\.0 s by the model"):
        pace_of(works_of(TRACE), MODEL.scaled(0.0))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("policy", ["1p1d", "collocated"])
def test_shapes_are_those_of_the_plans(policy: str, ahead: bool) -> None:
    """With hand-overs and chunked prompts; and no step begins before it is planned, nor before the last one's end."""
    engine = {"max_num_batched_tokens": 16, "enable_prefix_caching": False, "async_scheduling": ahead}
    config = ClusterConfig(
        "random:tiny", workers=2, policy=policy, launcher="inline", trace=True, engine=engine
    )
    launched: dict[str, list[tuple[float, list[ChunkShape]]]] = {"w0": [], "w1": []}
    with Cluster(config) as cluster:
        assert isinstance(cluster.launcher, InlineLauncher)
        for name, host in cluster.launcher.hosts.items():
            launch = host._loop.launch

            def note(plan: Any, name: str = name, launch: Any = launch) -> Any:
                shapes = [ChunkShape(each.count, each.start, each.samples) for each in plan.chunks]
                launched[name].append((cluster.clock(), shapes))
                return launch(plan)

            host._loop.launch = note
        prompts = [list(range(3, 3 + length)) for length in (40, 5, 16, 23)]
        cluster.generate(
            prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False
        )
        steps = cluster.steps()
    assert steps["w0"]
    assert steps["w1"]
    by_end = sorted((step.end, name) for name in steps for step in steps[name])
    shapes = shapes_of(sorted((step for each in steps.values() for step in each), key=lambda step: step.end))
    for name, recorded in steps.items():
        own = [each for each, (_, of) in zip(shapes, by_end, strict=True) if of == name]
        assert own == [each for _, each in launched[name]]
        last = float("-inf")
        for step, (at, _) in zip(recorded, launched[name], strict=True):
            assert last <= step.begin <= max(last, at) < step.end
            last = step.end
