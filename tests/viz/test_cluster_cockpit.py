"""Buttons and the slider do what they say, errors are shown, and what is shown are the recorder's figures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest

from nanopd_lab import Cluster
from nanopd_lab.bench.frames import Frame, Rolling, WorkerFrame
from nanopd_lab.bench.live import Phase
from nanopd_lab.bench.workload import random_workload
from nanopd_lab.router import Slo
from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.viz.cluster_cockpit import ClusterCockpit
from nanopd_lab.viz.cockpit_cost import FIGURES, cost_of_watching
from nanopd_lab.viz.cockpit_page import page
from nanopd_lab.viz.watch import Watch
from tests.bench.test_live import GREEDY, SHORT, inline, until

SLO = Slo(1.0, 0.5)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with inline("1p1d") as cluster:
        yield cluster


def make(cluster: Cluster, **options: Any) -> ClusterCockpit:
    return ClusterCockpit(cluster, SLO, SHORT, rate=100.0, drain_s=1.0, interval_s=0.02, **options)


def test_buttons_and_slider(cluster: Cluster) -> None:
    cockpit = make(cluster)
    assert (cockpit.state.value, cockpit.start_button.disabled, cockpit.stop_button.disabled) == (
        "idle", False, True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="nothing is recorded"):
        cockpit.replay()
    cockpit.start_button.click()
    assert (cockpit.state.value, cockpit.start_button.disabled, cockpit.stop_button.disabled) == (
        "running", True, False,
    )  # fmt: skip
    until(lambda: "w0→w1" in cockpit.watch.value)
    before = cockpit.watch.value
    until(lambda: cockpit.watch.value != before)
    cockpit.rate_slider.value = 20.0
    assert cockpit.load.rate == 20.0
    cockpit.start_button.click()  # somebody was faster
    assert "already" in cockpit.error.value
    cockpit.stop_button.click()
    until(lambda: cockpit.phase is Phase.IDLE and cockpit.state.value == "idle")
    assert not cockpit.start_button.disabled
    cluster.check_integrity()
    last = cockpit.recording().frames[-1]
    assert last.sent == last.completed == cockpit.load.sent > 0
    assert f"{last.sent} sent · 0 running · {last.sent} completed" in cockpit.watch.value
    explorer = cockpit.replay()
    explorer.controls["time"].value = explorer.controls["time"].max
    assert explorer.error.value == ""
    first = cockpit.recording()
    cockpit.run(0.1)  # a recording of its own
    assert cockpit.recording().frames[0].sent == 0
    assert cockpit.recording().frames is not first.frames
    assert cockpit.error.value == ""
    cockpit.close()
    cockpit.close()


def test_the_policy_is_chosen_while_it_stands_still(cluster: Cluster) -> None:
    cockpit = make(cluster, policies=("collocated", "no such"))
    assert cockpit.policy_choice.options == ("1p1d", "collocated", "no such")
    cockpit.policy_choice.value = "no such"
    assert "unknown policy" in cockpit.error.value
    assert cockpit.policy_choice.value == cluster.config.policy == "1p1d"
    cockpit.policy_choice.value = "collocated"
    assert set(cockpit.run(0.2).frames[-1].routes) <= {"w0", "w1"}
    assert "collocated" in cockpit.recording().title
    cockpit.start()
    assert cockpit.policy_choice.disabled
    until(lambda: cockpit.load.sent > 0)
    cockpit.stop()
    assert not cockpit.policy_choice.disabled


def test_errors_are_shown_and_raised_from_code(cluster: Cluster) -> None:
    cockpit = make(cluster, make_request=lambda rng: ([], GREEDY))
    cockpit.run(0.1)  # refused one by one
    assert "prompt is empty" in cockpit.error.value
    assert cockpit.load.refused > 0
    broken = make(cluster, make_request=lambda rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.run(5.0)
    assert "ZeroDivisionError" in broken.error.value
    assert not broken.start_button.disabled
    cluster.close()
    with pytest.raises(ValueError, match="closed"):
        cockpit.start()
    cockpit.start_button.click()
    assert "closed" in cockpit.error.value
    assert cockpit.state.value == "idle"
    with pytest.raises(ValueError, match="rate is -1"):
        ClusterCockpit(cluster, rate=-1)


def test_a_watch_shows_what_somebody_else_sends(cluster: Cluster) -> None:
    watch = Watch(cluster, SLO, interval_s=0.02)
    for count in (8, 5):
        with watch:
            cluster.bench(random_workload(count, Arrivals(100.0), SHORT), num_warmups=0, ready_timeout_s=0)
        assert f"{count} sent · 0 running · {count} completed" in watch.value
        assert watch.recording().frames[-1].completed == count
    watch.end()
    with watch, pytest.raises(ValueError, match="started before"):
        watch.recorder.start()


def test_the_page_says_the_frame_and_is_well_formed() -> None:
    workers = (
        WorkerFrame("w<0>", "prefill", 2, 1, 0, 0, 30, 120),
        WorkerFrame("w1", "gone"),
    )
    frames = [
        Frame(0.25 * n, 3, 10 + n, n, 1, {"w<0>→w1": n, "": 1}, Rolling(0.1 * n, None, 2.0, 1.0), workers)
        for n in range(200)
    ]
    text = page(frames, Slo(0.5, 0.1), 5.0, "a & b")
    ElementTree.fromstring(text.replace("&nbsp;", " "))
    words = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", text))
    for part in ("49.8 s", "209 sent", "9 running", "199 completed", "1 failed", "50% in time", "2 waits, 1 prefill",
                 "KV 25%", "gone", "3 wait", "of 500", "w&lt;0&gt;→w1 199", "none 1", "a &amp; b"):  # fmt: skip
        assert part in words, part
    assert "TTFT (ms) 19,900" in words
    assert "TPOT (ms) –" in words
    assert len(text) < 12_000
    assert page(frames[:1], Slo(), 5.0) != text


def test_the_cost_of_watching_is_measured_in_turns(cluster: Cluster) -> None:
    workload = random_workload(4, Arrivals(200.0), SHORT)
    cost = cost_of_watching(cluster, workload, rounds=2, interval_s=0.01)
    assert set(cost.without) == set(cost.watched) == set(cost.ratio) == set(FIGURES)
    assert min(*cost.without.values(), *cost.watched.values(), cost.busy) > 0
    assert "with/without" in str(cost)
    with pytest.raises(ValueError, match="rounds is 0"):
        cost_of_watching(cluster, workload, rounds=0)
