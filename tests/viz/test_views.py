"""Figures are pure functions of a recorded run, and the explorer shows what its controls say."""

from __future__ import annotations

import io

import ipywidgets
import pytest
from matplotlib.figure import Figure
from PIL import Image

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.attention.capture import CaptureBackend
from nanopd_lab.attention.torch_backend import TorchBackend
from nanopd_lab.cost.roofline import ChunkShape, ModelDims, Roof, step_cost
from nanopd_lab.engine.config import EngineParts
from nanopd_lab.engine.trace import Trace, run_traced
from nanopd_lab.viz.accumulation import accumulate, accumulation_view, error_by_pages, error_view
from nanopd_lab.viz.blocks import block_view, filled, owners, reserved_slots, used_share, waste_view
from nanopd_lab.viz.explorer import Explorer, player
from nanopd_lab.viz.latency import Tradeoff, budget_tradeoff, itl_spikes
from nanopd_lab.viz.roofline import Point, decode_budget, roofline
from nanopd_lab.viz.steps import step_gantt
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


@pytest.fixture(scope="module")
def busy() -> Trace:
    """Two answers under way, and a prompt of 40 tokens that comes after 3 steps and is read in chunks."""
    llm = LLM("random:tiny", device="cpu", max_num_batched_tokens=16, enable_prefix_caching=False)
    prompts = [[1, 2, 3], [4, 5], list(range(1, 41))]
    each = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (12, 9, 3)]
    return run_traced(llm.engine, prompts, each, after_steps=[0, 0, 3])


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


# ---------------------------------------------------------------------- traces with arrivals, batches, preemption


def test_a_request_arrives_after_its_steps(busy: Trace) -> None:
    first = next(i for i, step in enumerate(busy.steps) if any(w.request == 2 for w in step.work))
    assert first == 3
    assert busy.arrivals_s[0] == pytest.approx(busy.arrivals_s[1], abs=0.1)
    assert busy.steps[2].end_s <= busy.arrivals_s[2] <= busy.steps[3].start_s
    assert [w.past for step in busy.steps for w in step.work if w.request == 2] == [0, 14, 28, 40, 41]
    for number, length in enumerate((12, 9, 3)):
        times = busy.token_times_s(number)
        assert len(times) == length == len(busy.outputs[number].outputs[0].token_ids)
        assert times == sorted(times)
        assert len(busy.itl_s(number)) == length - 1
        assert sum(busy.itl_s(number)) == pytest.approx(times[-1] - times[0])
    # The prompt takes three steps, in each of which both readers get a token.
    assert len(busy.gaps_while_reading_s(2, [0, 1])) == 6


def test_every_step_costs_something_and_the_past_is_right(busy: Trace, runs: dict[str, Trace]) -> None:
    for trace in (busy, *runs.values()):
        known = dict.fromkeys(range(3), 0)
        for step in trace.steps:
            for work in step.work:
                assert work.past == known[work.request]
                known[work.request] += work.tokens


def test_a_static_batch_waits_for_its_slowest() -> None:
    llm = LLM("random:tiny", device="cpu", enable_prefix_caching=False)
    each = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 8, 3, 3)]
    prompts = [[1, 2, 3]] * 4
    static = run_traced(llm.engine, prompts, each, static_batch=2)
    continuous = run_traced(llm.reconfigured(max_num_seqs=2).engine, prompts, each)
    assert (len(static.steps), len(continuous.steps)) == (11, 8)  # as worked by hand in notebook 05
    assert static.steps[0].waiting == 2
    assert {output.metrics.arrival_time for output in static.outputs} == {
        static.outputs[0].metrics.arrival_time
    }


@pytest.fixture(scope="module")
def tight() -> Trace:
    llm = LLM("random:tiny", device="cpu", enable_prefix_caching=False)
    pool = 5 * llm.engine.cache.shape.block_bytes
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    trace = run_traced(llm.reconfigured(kv_cache_memory_bytes=pool).engine, [[1] * 20, [2] * 20], params)
    assert [o.outputs[0].token_ids for o in trace.outputs] == [
        o.outputs[0].token_ids for o in run_traced(llm.engine, [[1] * 20, [2] * 20], params).outputs
    ]
    return trace


def test_preemptions_are_recorded(tight: Trace) -> None:
    lost = [number for step in tight.steps for number in step.preempted]
    assert lost == [1]
    assert tight.outputs[1].metrics.num_preemptions == 1
    again = [w for step in tight.steps for w in step.work if w.request == 1 and w.phase == "prefill"]
    assert again[0].past == again[1].past == 0
    assert again[1].tokens > 20  # the answer so far is computed again with the prompt


def test_the_gantt_has_a_cell_for_each_piece_of_work(busy: Trace, tight: Trace) -> None:
    fig = step_gantt({"one": busy, "two": tight})
    for ax, trace in zip(fig.axes, (busy, tight), strict=True):
        work = sum(len(step.work) for step in trace.steps)
        assert len(ax.patches) == work + len(trace.outputs)  # and one bar behind each request
        assert ax.get_ylabel() == "request"
        crosses = [line for line in ax.lines if line.get_marker() == "X"]
        assert len(crosses) == sum(len(step.preempted) for step in trace.steps)
    assert "preempted: blocks lost" in [text.get_text() for text in fig.legends[0].get_texts()]
    assert "preempted: blocks lost" not in str(
        [text.get_text() for text in step_gantt({"one": busy}).legends[0].get_texts()]
    )
    assert png(step_gantt({"one": busy}, names=["a", "b", "new"])) != png(step_gantt({"one": busy}))


def test_spikes_are_as_high_as_the_gaps(busy: Trace) -> None:
    fig = itl_spikes({"run": busy}, readers=[0, 1], newcomer=2)
    (ax,) = fig.axes
    drawn = [value for line in ax.lines for value in line.get_ydata()]  # type: ignore[union-attr]
    assert drawn == pytest.approx([1e3 * gap for reader in (0, 1) for gap in busy.itl_s(reader)])
    longest = max(drawn)
    assert f"longest gap {longest:.0f} ms" in ax.get_title(loc="left")
    assert ax.get_ylabel() == "gap (ms)"
    assert ax.get_xlabel() == "time (s)"


def test_the_tradeoff_points_out_the_chosen_budget() -> None:
    rows = [Tradeoff(32, 900.0, 50.0), Tradeoff(1024, 300.0, 280.0)]
    plain, chosen = budget_tradeoff(rows), budget_tradeoff(rows, chosen=32)
    assert texts(plain) == ["32 tokens", "1,024 tokens"]
    assert png(plain) != png(chosen)


def test_the_roofline_shows_both_ceilings_and_every_point() -> None:
    roof = Roof(10e9, 100e9, "a machine")
    points = [Point("decode", "1", 0.5, 4e9), Point("prefill", "256", 60.0, 8e10)]
    fig = roofline(roof, points)
    shown = " ".join(texts(fig))
    for words in ("10 GB/s", "100 GFLOP/s", "ridge: 10.0 FLOP/byte", "256"):
        assert words in shown
    (ax,) = fig.axes
    line = ax.lines[0]
    assert max(line.get_ydata()) == 100e9  # type: ignore[arg-type]
    assert ax.get_title(loc="left") == "Roofline of a machine"
    assert len(roofline(roof).axes[0].lines) < len(ax.lines)


def test_a_decode_step_is_as_long_as_its_longer_bar() -> None:
    model = ModelDims("toy", 2, 4, 8, 2, 1, 2, 10, True, 4, 4)
    roof = Roof(1e6, 1e6, "a machine")
    for batch, context in ((1, 3), (64, 3), (8, 2000)):
        seconds = roof.seconds(step_cost(model, [ChunkShape(1, context)] * batch))
        right = decode_budget(model, roof, batch, context).axes[1]
        bars = [bar.get_x() + bar.get_width() for bar in right.patches]  # type: ignore[attr-defined]
        assert max(bars) == pytest.approx(1e3 * seconds)
        assert right.get_xlim()[1] > max(bars)
        assert f"batch {batch}, context {context:,}" in right.get_title(loc="left")


# ---------------------------------------------------------------------- blocks


@pytest.fixture(scope="module")
def forked() -> Trace:
    """Three samples of a prompt of 29 tokens in blocks of 8, and two plain requests."""
    llm = LLM("random:tiny", device="cpu", block_size=8, max_num_batched_tokens=32)
    params = [SamplingParams(temperature=1, seed=1, n=n, max_tokens=9, ignore_eos=True) for n in (3, 1, 1)]
    return run_traced(llm.engine, PROMPTS, params)


def test_a_trace_knows_who_owns_which_block(forked: Trace) -> None:
    assert forked.output_tokens == 5 * 9
    for record in forked.steps:
        assert len(owners(record)) == record.blocks_used
        assert all(1 <= tokens <= 8 for tokens in filled(record, 8).values())
        for table in record.tables:
            assert len(table.blocks) == -(-table.tokens // 8)
            assert table.most_tokens == len(PROMPTS[table.request]) + 9
    # After the fork the samples share the prompt's four blocks; then only the three full ones.
    most = [max(map(len, owners(record).values()), default=0) for record in forked.steps]
    assert max(most) == 3
    last = [record for record in forked.steps if sum(table.request == 0 for table in record.tables) == 3][-1]
    assert sum(len(who) == 3 for who in owners(last).values()) == 3


def test_the_block_view_shows_owners_sharing_and_the_empty_pool(forked: Trace) -> None:
    shared = next(n for n, r in enumerate(forked.steps, 1) if max(map(len, owners(r).values())) == 3)
    shown = texts(block_view(forked, shared))
    assert "A×3" in shown
    assert {"A.1", "A.2", "A.3"} <= set(shown)
    assert "A×3" not in texts(block_view(forked, 0))
    fig = block_view(forked, len(forked.steps))
    assert fig.axes[0].get_title(loc="left").startswith(f"pool: 0 of {forked.num_blocks} blocks in use")
    assert png(block_view(forked, 2)) == png(block_view(forked, 2)) != png(block_view(forked, 3))
    with pytest.raises(ValueError, match="this run has steps 1 to"):
        block_view(forked, 99)


def test_the_player_steps_through_the_run(forked: Trace) -> None:
    explorer = player(lambda step: block_view(forked, step), last=len(forked.steps), start=1)
    assert explorer.image.value == png(block_view(forked, 1))
    explorer.controls["step"].value = 4
    assert explorer.image.value == png(block_view(forked, 4))
    assert isinstance(explorer.children[0], ipywidgets.Play)


def test_reserved_memory_is_counted_for_the_same_sequences(runs: dict[str, Trace]) -> None:
    trace = runs["all at once"]
    slots = reserved_slots(trace, max_model_len=100)
    first = trace.steps[0]
    assert slots["the model's limit"][0] == 100 * len(first.tables)
    assert slots["prompt + max_tokens"][0] == sum(len(PROMPTS[t.request]) + 4 for t in first.tables)
    assert slots["paged"] == [16 * record.blocks_used for record in trace.steps]
    assert slots["tokens"] == [sum(table.tokens for table in record.tables) for record in trace.steps]
    share = used_share(slots)
    assert 0 < share["the model's limit"] < share["paged"] <= 1
    assert len(waste_view(trace, 100).axes) == 2


# ---------------------------------------------------------------------- accumulation


def test_the_accumulation_ends_at_the_dense_answer() -> None:
    camera = CaptureBackend(TorchBackend())
    llm = LLM("random:tiny", device="cpu", block_size=4, parts=EngineParts(attention=camera))
    llm.generate([PROMPTS[0]], PARAMS[0], use_tqdm=False)
    found = accumulate(camera.layers[1], head=2)
    assert found.pages == 8  # 29 + 3 tokens
    assert found.errors[-1] < 1e-6 < found.errors[0]
    assert found.maxima == sorted(found.maxima)
    assert found.maxima[-1] == pytest.approx(found.scores.max().item())
    errors = error_by_pages(camera.layers)
    assert max(map(max, errors["rescaled"].values())) < 1e-5
    assert errors["not rescaled"][1] == errors["rescaled"][1]  # one page needs no factor
    first, last = (accumulation_view(camera.layers, 1, 2, page) for page in (0, 7))
    assert first.axes[0].get_title(loc="left").endswith("after page 1 of 8")
    assert png(first) != png(last) == png(accumulation_view(camera.layers, 1, 2, 99))
    assert "float64" in error_view(camera.layers).axes[0].get_ylabel()
