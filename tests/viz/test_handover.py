"""The figures of a hand-over show what was recorded, and what the model says."""

from __future__ import annotations

from typing import Any

import ipywidgets
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nanopd_lab import Cluster, ClusterConfig, SamplingParams
from nanopd_lab.cluster.host import StepRecord
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.cluster.trace import decode_gaps_s, run_with_latecomer
from nanopd_lab.viz.explorer import Explorer
from nanopd_lab.viz.handover import LINK, SOURCE, TARGET, handover_timeline, pipeline_view

Run = tuple[dict[str, list[StepRecord]], list[ClusterOutput]]


def serve(policy: str) -> Run:
    config = ClusterConfig(
        "random:tiny", policy=policy, launcher="inline", trace=True, engine={"max_num_batched_tokens": 16}
    )
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    readers = [([start, start + 1, start + 2], greedy) for start in (5, 30)]
    late = (list(range(50, 110)), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    with Cluster(config) as cluster:
        outputs = run_with_latecomer(cluster, readers, late, after_tokens=3)
        return cluster.steps(), outputs


@pytest.fixture(scope="module")
def run() -> Run:
    return serve("1p1d")


def bars(ax: Any, lane: int) -> list[Rectangle]:
    found = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    return [bar for bar in found if round(bar.get_y() + 0.34) == lane and bar.get_height() < 0.7]


def texts(fig: Figure) -> list[str]:
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def test_the_latecomer_comes_late_and_all_settle(run: Run) -> None:
    _, outputs = run
    assert all(output.settled for output in outputs)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 20, 4]
    assert outputs[2].metrics.arrival_time > max(o.metrics.first_token_time or 0 for o in outputs[:2])


def test_the_timeline_shows_every_chunk_and_pull(run: Run) -> None:
    steps, outputs = run
    fig = handover_timeline(steps, outputs)
    whole, end = fig.axes
    path = outputs[-1].paths[0]
    assert path.last is not None
    assert path.last.decode is not None
    chunks = [
        s for s in steps["w0"] if any(k.startswith(outputs[-1].request_id + "/") for k, _, _ in s.chunks)
    ]
    drawn = [bar for bar in bars(whole, SOURCE) if bar.get_width() > 0]
    assert len(chunks) == 4
    assert len(drawn) >= len(chunks)
    assert len(bars(whole, LINK)) == len(path.last.decode.pulls) == 4
    assert len(bars(whole, TARGET)) > 0
    assert {"1", "2", "3", "4"} <= set(texts(fig))
    visible = 1e3 * (path.transfer_visible_s or 0.0)
    assert f"{visible:.1f} ms" in texts(fig)
    assert whole.get_xlabel().endswith("(s)")
    assert end.get_xlabel().endswith("(ms)")
    assert [label.get_text() for label in whole.get_yticklabels()] == ["w0 computes", "pulls", "w1 computes"]


def test_hidden_and_visible_add_up(run: Run) -> None:
    for output in run[1]:
        path = output.paths[0]
        assert path.transfer_visible_s is not None
        assert (
            0 <= path.transfer_hidden_s <= path.transfer_s <= path.transfer_hidden_s + path.transfer_visible_s
        )


def test_who_stays_on_one_worker_has_no_hand_over() -> None:
    steps, outputs = serve("collocated")
    assert outputs[-1].paths[0].transfer_hidden_s == 0
    with pytest.raises(ValueError, match="served by one worker"):
        handover_timeline(steps, outputs)


def test_gaps_are_those_between_decode_tokens(run: Run) -> None:
    steps, outputs = run
    gaps = decode_gaps_s(steps, outputs[0].request_id, 0.0, float("inf"))
    assert len(gaps) == 20 - 2  # the first token comes from the other worker, and has no gap before it
    assert all(gap > 0 for gap in gaps)
    ends = [step.end for step in steps["w1"]]
    assert sum(gaps) <= max(ends) - min(ends)
    assert decode_gaps_s(steps, outputs[0].request_id, 0.0, 0.0) == []


def test_the_model_draws_both_ways_on_one_axis() -> None:
    fig = pipeline_view([2.0, 2.0], [1.0, 1.0])
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert "modelled" in titles[0]
    assert "after 5.00 s, 1.00 s of it visible" in titles[0]
    assert "after 6.00 s, 2.00 s of it visible" in titles[1]
    copies = [[bar.get_x() for bar in bars(ax, LINK)] for ax in fig.axes]
    assert copies == [[2.0, 4.0], [4.0, 5.0]]


def test_the_model_takes_a_learners_function_and_follows_sliders() -> None:
    asked = []

    def mine(compute_s: Any, copy_s: Any, overlap: bool) -> list[float]:
        asked.append(overlap)
        return [sum(compute_s) + sum(copy_s)] * len(copy_s)

    def view(chunks: int) -> Figure:
        return pipeline_view([1.0] * chunks, [1.0] * chunks, mine)

    explorer = Explorer(view, chunks=ipywidgets.IntSlider(value=2, min=1, max=40))
    before = explorer.image.value
    explorer.controls["chunks"].value = 40
    assert explorer.image.value != before
    assert explorer.error.value == ""
    assert set(asked) == {True, False}
