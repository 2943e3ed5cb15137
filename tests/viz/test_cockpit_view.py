"""The dashboard shows the frame of its moment, on axes that don't move, and replays any run."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from nanopd_lab.bench.frames import Frame, Rolling, WorkerFrame
from nanopd_lab.bench.recording import Recording
from nanopd_lab.router import Slo
from nanopd_lab.viz.cockpit_view import MOST_WORKERS, PHASES, cockpit_view, phase_counts
from nanopd_lab.viz.replay import STEPS, replay
from nanopd_lab.viz.style import png
from tests.bench.test_recording import SLO, simulated


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.of(simulated("1p1d", 8.0)[1])


def test_bars_are_the_frames(recording: Recording) -> None:
    time = 0.4 * recording.duration_s
    frame = recording.at(time)
    work, kv, routes, requests, *_ = cockpit_view(recording, time).axes
    queue, *bars = work.patches
    assert queue.get_width() == frame.queued
    widths = [bar.get_width() for bar in bars]
    wanted = [phase_counts(worker)[phase] for phase in range(len(PHASES)) for worker in frame.workers]
    assert widths == wanted
    assert sum(wanted) > 0
    assert [bar.get_width() for bar in kv.patches] == [worker.kv_used for worker in frame.workers]
    assert [bar.get_width() for bar in routes.patches] == list(frame.routes.values())
    assert requests.lines[0].get_ydata()[-1] == frame.sent
    assert to_hex(work.figure.get_facecolor()) == "#ffffff"


def test_axes_stay_and_say_their_units(recording: Recording) -> None:
    early, late = (cockpit_view(recording, share * recording.duration_s) for share in (0.1, 1.0))
    for one, other in zip(early.axes, late.axes, strict=True):
        assert one.get_xlim() == other.get_xlim()
        assert one.get_ylim() == other.get_ylim()
    labels = {text for ax in late.axes for text in (ax.get_xlabel(), ax.get_ylabel()) if text}
    assert labels == {
        "requests", "KV (tokens)", "ended, by route", "TTFT (ms)", "TPOT (ms)", "requests/s",
        "time since the begin (s)",
    }  # fmt: skip
    assert "modelled" in late.get_suptitle()
    assert "TTFT ≤ 300 ms" in late.get_suptitle()


def test_blocks_are_shown_as_a_share_and_many_workers_are_cut() -> None:
    workers = tuple(WorkerFrame(f"w{n}", "gone", kv_used=n, kv_total=40) for n in range(20))
    frames = [Frame(time, 3, 4, 0, 1, {"": 1}, Rolling(), workers) for time in (0.0, 1.0)]
    fig = cockpit_view(Recording("live (measured)", Slo(), 1.0, frames, []))
    work, kv, routes, *_ = fig.axes
    assert [bar.get_width() for bar in kv.patches] == [2.5 * n for n in range(MOST_WORKERS)]
    assert kv.get_xlabel() == "KV blocks in use (%)"
    assert "4 workers more" in work.get_xlabel()
    assert [label.get_text() for label in routes.get_yticklabels()] == ["none"]
    assert len(png(fig)) > 5_000
    with pytest.raises(ValueError, match="nothing is recorded"):
        Recording("", Slo(), 1.0, [], [])


def test_a_replay_follows_its_slider_and_its_buttons() -> None:
    explorer = replay(simulated("collocated", 8.0)[1], SLO)
    buttons, slider = explorer.children[0], explorer.controls["time"]
    before = explorer.image.value
    slider.value = 0.9 * slider.max
    assert explorer.image.value != before
    buttons.value = STEPS // 4
    assert slider.value == pytest.approx(slider.max / 4)
    assert explorer.error.value == ""
    assert bytes(explorer.image.value).startswith(b"\x89PNG")
