"""The pace of a machine: of traces made by hand, and of a cluster whose plans are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from nanopd_lab import Cluster, ClusterConfig, SamplingParams
from nanopd_lab.bench.steps_pace import pace_of, shapes_of
from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.inline import InlineLauncher
from nanopd_lab.cost.company import Company
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.roofline import ChunkShape

MODEL = IterationModel(1.0, 2.0, 0.01, 1e-4, 1e-3, 0.1, vocab_share=0.5)
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


def test_pace_is_what_steps_took_by_what_the_model_says() -> None:
    seen: list[Sequence[ChunkShape]] = []

    def seconds(shapes: Sequence[ChunkShape]) -> float:
        seen.append(shapes)
        return MODEL.seconds(shapes)

    measured_s = 4.0 + 3.0 + 2.0 + 2.0
    pace = pace_of(TRACE, seconds)
    assert pace == pytest.approx(measured_s / sum(map(MODEL.seconds, SHAPES)))
    assert seen == SHAPES
    assert pace_of(TRACE, MODEL.scaled(4.0).seconds) == pytest.approx(pace / 4)


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
    assert pace_of(steps, lambda _: 1.0, company) == pytest.approx(work_s / 3)
    assert pace_of(steps, lambda _: 1.0) == pytest.approx((4 + 2 + 2) / 3)


def test_no_steps_have_no_pace() -> None:
    with pytest.raises(ValueError, match="no step"):
        pace_of({"w0": [], "w1": []}, MODEL.seconds)
    with pytest.raises(ValueError, match="0 s by the model"):
        pace_of(TRACE, lambda _: 0)


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
