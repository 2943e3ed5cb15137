"""Figures are pure functions of a recorded run, and the explorer shows what its controls say."""

from __future__ import annotations

import io

import ipywidgets
import pytest
from matplotlib.figure import Figure
from PIL import Image

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.engine.trace import Trace, run_traced
from nanopd_lab.kernels.report import Counters, LineCounters, WarpAccess
from nanopd_lab.viz.explorer import Explorer
from nanopd_lab.viz.ladder import recorded_ladder, recorded_nanopd, roof_figure, shapes_of
from nanopd_lab.viz.sectors import sector_picture, traffic_bars
from nanopd_lab.viz.style import figure, png
from nanopd_lab.viz.system import system_map
from nanopd_lab.viz.timeline import request_timeline

PROMPTS = [list(range(1, 30)), [7, 8, 9], list(range(5, 30))]
PARAMS = [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for tokens in (4, 9)]


@pytest.fixture(scope="module")
def runs() -> dict[str, Trace]:
    llm = LLM("random:tiny", device="cpu", max_num_batched_tokens=16, enable_prefix_caching=False)
    return {
        "one at a time": run_traced(llm.engine, PROMPTS, PARAMS[0], one_at_a_time=True),
        "all at once": run_traced(llm.engine, PROMPTS, PARAMS[0]),
    }


def texts(fig: Figure) -> list[str]:
    return [text.get_text() for ax in fig.axes for text in ax.texts]


def test_a_trace_accounts_for_every_token(runs: dict[str, Trace]) -> None:
    for trace in runs.values():
        for number, (prompt, output) in enumerate(zip(PROMPTS, trace.outputs, strict=True)):
            work = [work for step in trace.steps for work in step.work if work.request == number]
            prefill = [w.tokens for w in work if w.phase == "prefill"]
            decode = [w.tokens for w in work if w.phase == "decode"]
            assert sum(prefill) == len(prompt)
            # The first token falls out of the prefill, and the last is never fed in again.
            assert decode == [1] * (len(output.outputs[0].token_ids) - 1)
        assert all(sum(w.tokens for w in step.work) <= 16 for step in trace.steps)
        assert trace.steps[-1].finished == len(PROMPTS)
        assert trace.steps[-1].blocks_used == trace.steps[-1].waiting == trace.steps[-1].running == 0
        assert trace.output_tokens == 12
        assert 0 < sum(step.seconds for step in trace.steps) <= trace.seconds


def test_one_at_a_time_never_shares_a_step(runs: dict[str, Trace]) -> None:
    def most(trace: Trace) -> int:
        return max(len(step.work) for step in trace.steps)

    one, together = runs.values()
    assert most(one) == 1
    assert most(together) == 3
    assert [o.outputs[0].token_ids for o in one.outputs] == [o.outputs[0].token_ids for o in together.outputs]
    # Waiting counts from the common arrival, not from when it is a request's turn.
    first_token = [output.metrics.ttft or 0.0 for output in one.outputs]
    assert first_token == sorted(first_token)
    assert {output.metrics.arrival_time for output in one.outputs} == {one.outputs[0].metrics.arrival_time}


def test_the_map_shows_the_step_as_it_was(runs: dict[str, Trace]) -> None:
    trace = runs["all at once"]
    shown = texts(system_map(trace, 1))
    assert "16 prompt tokens" in shown
    assert "0 answer tokens" in shown
    assert f"step 1 of {len(trace.steps)}, " in " ".join(shown)
    assert "of 3 finished" in shown
    assert texts(system_map(trace, 0)).count("3") == 1  # all three wait
    assert "3" in texts(system_map(trace, len(trace.steps)))  # all three are finished
    with pytest.raises(ValueError, match="this run has steps 1 to"):
        system_map(trace, len(trace.steps) + 1)


def test_every_folder_on_the_map_that_is_drawn_solid_exists() -> None:
    from nanopd_lab.resources import _PACKAGE
    from nanopd_lab.viz.system import BOXES

    for box in BOXES:
        for place in box.place.split(", "):
            assert box.later or (_PACKAGE / place).exists(), f"{box.title}: {place}"
    assert "dashed: what later ones add" in " ".join(texts(system_map()))


def test_the_timeline_has_one_bar_a_phase_and_ends_when_the_run_does(runs: dict[str, Trace]) -> None:
    fig = request_timeline(runs)
    assert len(fig.axes) == 2
    for ax, trace in zip(fig.axes, runs.values(), strict=True):
        assert len(ax.patches) == 3 * len(PROMPTS)
        ends = max(bar.get_x() + bar.get_width() for bar in ax.patches)  # type: ignore[attr-defined]
        assert ends == pytest.approx(trace.seconds, rel=0.2)
        assert ax.get_ylabel() == "question"
    assert fig.axes[-1].get_xlabel().endswith("(s)")


def test_a_picture_is_white_at_the_edge_and_small(runs: dict[str, Trace]) -> None:
    data = png(request_timeline(runs))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert image.size[0] == 960
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert len(data) < 60_000
    assert png(system_map(runs["all at once"], 2)) == png(system_map(runs["all at once"], 2))


def test_moving_a_slider_changes_the_picture_and_moving_it_back_restores_it(runs: dict[str, Trace]) -> None:
    trace = runs["all at once"]
    slider = ipywidgets.IntSlider(value=1, min=0, max=99)
    explorer = Explorer(lambda step: system_map(trace, step), step=slider)
    first = explorer.image.value
    assert first == png(system_map(trace, 1))
    slider.value = 3
    assert explorer.image.value == png(system_map(trace, 3)) != first
    slider.value = 1
    assert explorer.image.value == first
    assert explorer.children == (slider, explorer.image, explorer.error)


def test_an_error_in_a_callback_is_shown_and_goes_away(runs: dict[str, Trace]) -> None:
    slider = ipywidgets.IntSlider(value=1, min=0, max=99)
    explorer = Explorer(lambda step: system_map(runs["all at once"], step), step=slider)
    shown = explorer.image.value
    slider.value = 99
    assert "this run has steps" in explorer.error.value
    assert explorer.image.value == shown
    slider.value = 2
    assert explorer.error.value == ""


def test_an_error_at_the_start_is_raised() -> None:
    def broken(x: int) -> Figure:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        Explorer(broken, x=ipywidgets.IntSlider())
    assert figure()._repr_png_()[:4] == b"\x89PNG"


def test_the_sector_picture_shows_what_the_emulator_saw() -> None:
    access = WarpAccess("yours.cu", 3, "global", "read", 0, 4, tuple(32 * lane for lane in range(32)))
    neighbours = WarpAccess("yours.cu", 3, "global", "read", 0, 4, tuple(4 * lane for lane in range(32)))
    fig = sector_picture({"apart": access, "together": neighbours, "not run": None}, total_bytes=1024)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles == ["apart: 32 sectors, 1,024 bytes for 128", "together: 4 sectors, 128 bytes for 128"]
    for ax in fig.axes:
        assert len(ax.patches) == 1024 // 32 + 32  # a box a sector, a mark a lane
        assert ax.get_xlabel() == "+ bytes"
    assert "no C++ compiler" in texts(sector_picture({"not run": None}, 1024))[0]


def test_traffic_is_measured_against_what_must_be_read_once() -> None:
    def counted(sectors: int) -> Counters:
        line = LineCounters("a.cu", 1, "global", "read", 1, 32, 128, sectors, 0, 0)
        return Counters((line,), steps=10, lane_steps=160)

    fig = traffic_bars({"naive": counted(300), "gqa": counted(100)}, needed_bytes=3200)
    assert {"3.0 ×", "1.0 ×", "50%"} <= {text.strip() for text in texts(fig)}
    assert "(a) naive" in [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert traffic_bars({}, 3200).axes


def test_the_roof_figure_keeps_nanopd_to_its_own_roof() -> None:
    record = recorded_ladder()
    for shape, row in enumerate(shapes_of(record)):
        fig = roof_figure(record, shape)
        labels = [label.get_text() for label in fig.axes[0].get_yticklabels()]
        assert len(labels) == len(row["results"]) + ("nanoPD" in labels)
        assert all("H100" in text for text in texts(fig) if "roof" in text)
    theirs = recorded_nanopd()
    for row in theirs["shapes"]:
        floor = row["kv_bytes"] / theirs["ceilings"]["read_gb_s"] / 1e3
        assert row["fraction_of_roof"] == pytest.approx(floor / row["median_us"], rel=1e-2)
        assert row["kv_bytes"] == row["batch"] * row["context"] * 4096
