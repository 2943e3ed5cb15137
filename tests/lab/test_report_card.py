"""A report card says what is better, whichever way better is, and its clock runs what it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from nanopd_lab import LLM
from nanopd_lab.lab.report_card import Line, ReportCard, StepSize, hugging_face_step, served_per_s, step_times
from nanopd_lab.viz.cells import cells_view
from nanopd_lab.viz.report_card import card_view
from tests.hf import save_tiny

figures = st.floats(0.001, 1e6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, PreTrainedModel]:
    folder = save_tiny("llama", tmp_path_factory.mktemp("llama"))
    llm = LLM(str(folder), device="cpu", kv_cache_memory_bytes=1 << 22, enable_prefix_caching=False)
    return llm, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@given(figures, figures, st.booleans())
def test_twice_as_good_is_the_reverse_of_half_as_good(yours: float, package: float, more: bool) -> None:
    ratio = Line("x", "ms", yours, package, more=more).times_as_good(yours)
    other = Line("x", "ms", package, yours, more=more).times_as_good(package)
    assert ratio * other == pytest.approx(1)
    assert (ratio > 1) == ((yours > package) if more else (yours < package)) or yours == package


@pytest.mark.parametrize(
    ("yours", "package", "more", "words"),
    [
        (100, 105, False, "level"),
        (100, 130, False, "30% better"),
        (100, 250, False, "2.5 times as good"),
        (130, 100, False, "30% worse"),
        (300, 100, False, "3.0 times worse"),
        (300, 100, True, "3.0 times as good"),
        (50, 60, True, "20% worse"),
        (0, 0, False, "level"),
        (0, 1, True, "inf times worse"),
    ],
)
def test_a_verdict_in_words(yours: float, package: float, more: bool, words: str) -> None:
    if words.startswith("inf"):
        assert Line("x", "ms", yours, package, more=more).times_as_good(yours) == 0
    else:
        assert Line("x", "ms", yours, package, more=more).verdict == words


def test_a_card_shows_its_lines_as_text_html_and_figure() -> None:
    card = ReportCard()
    with pytest.raises(ValueError, match="empty"):
        card_view(card)
    card.add("decode step", "ms", yours=50, package=25, peer=("Hugging Face", 100))
    card.add("kept", "%", yours=99, package=90, more=True)
    assert "decode step, ms" in str(card)
    assert "100 (Hugging Face)" in str(card)
    assert "2.0 times worse" in card._repr_html_()
    figure = card_view(card, "mine")
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["decode step", "kept"]
    yours = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]  # type: ignore[index]
    assert yours == pytest.approx([0.5, 1.1])
    assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "D"] == [0.25]  # type: ignore[index]


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_figure_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="figures are at least 0"):
        ReportCard().add("decode step", "ms", yours=value, package=1.0)


def test_steps_of_all_systems_are_timed(tiny: tuple[LLM, PreTrainedModel]) -> None:
    llm, model = tiny
    sizes = [StepSize("decode", 2, 9, 1), StepSize("prompt", 1, 0, 12)]
    found = step_times({"yours": llm, "package": llm}, model, sizes, rounds=2, repeats=1)
    assert set(found) == {"yours", "package", "Hugging Face"}
    assert all(set(each) == {"decode", "prompt"} for each in found.values())
    assert all(seconds > 0 for each in found.values() for seconds in each.values())


def test_the_peers_step_has_the_past_that_it_says_each_time(
    tiny: tuple[LLM, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = tiny
    seen = []
    forward = model.forward

    def watched(ids: torch.Tensor, past_key_values: object, **more: object) -> object:
        seen.append((tuple(ids.shape), past_key_values.get_seq_length()))  # type: ignore[attr-defined]
        return forward(ids, past_key_values=past_key_values, **more)

    monkeypatch.setattr(model, "forward", watched)
    step = hugging_face_step(model, StepSize("decode", 3, 9, 1))
    assert step() > 0 < step()
    assert seen == [((3, 9), 0), ((3, 1), 9), ((3, 1), 9)]


def test_requests_are_served_whole(tiny: tuple[LLM, PreTrainedModel]) -> None:
    llm, model = tiny
    before = llm.stats().computed_tokens
    found = served_per_s({"yours": llm}, model, [([5, 6, 7, 8, 9], 4), ([5, 6], 2)], rounds=1)
    assert set(found) == {"yours", "Hugging Face"}
    assert all(rate > 0 for rate in found.values())
    assert llm.stats().blocks.used == 0
    assert llm.stats().computed_tokens == before + (5 + 3) + (
        2 + 1
    )  # the last token of an answer is not computed


def test_pools_are_drawn_by_size() -> None:
    (ax,) = cells_view({0.9: {4: 0.8, 8: 0.99}, 1.1: {4: 0.3, 8: 0.4}}, "simulated").axes
    assert [list(line.get_xdata()) for line in ax.lines] == [[4, 8], [4, 8]]
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.8, 0.99], [0.3, 0.4]]
    assert ax.get_ylim()[0] < 0.3
    for wrong in ({}, {0.9: {}}, {load: {4: 1.0} for load in range(1, 6)}):
        with pytest.raises(ValueError, match="loads; give 1 to 4"):
            cells_view(wrong)  # type: ignore[arg-type]
