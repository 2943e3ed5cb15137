"""Figures of the kernels: the ladder against the roof, and who touches which sector."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from nanopd_lab.kernels.report import Counters, LineCounters, WarpAccess
from nanopd_lab.viz.breakdown import recorded_engine, step_breakdown, step_parts
from nanopd_lab.viz.ladder import recorded_ladder, recorded_nanopd, roof_figure, shapes_of
from nanopd_lab.viz.sectors import sector_picture, traffic_bars
from nanopd_lab.viz.style import png


def texts(fig: Figure) -> list[str]:
    return [text.get_text() for ax in fig.axes for text in ax.texts]


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


def test_a_recorded_step_is_as_long_as_its_parts() -> None:
    record = recorded_engine()
    for mode in ("eager", "off", "default"):
        parts = step_parts(record, mode)
        assert sum(parts.values()) == pytest.approx(record["modes"][mode]["decode_64"], rel=0.03)
        assert all(value >= 0 for value in parts.values())
    assert step_parts(record, "eager")["idle"] > 10 * step_parts(record, "off")["idle"]


def test_the_step_breakdown_says_where_it_comes_from_and_shows_the_limit() -> None:
    record = recorded_engine()
    fig = step_breakdown(record)
    title = fig.get_suptitle()
    assert "H100" in title
    assert "recorded 2026-11-25" in title
    assert f"{record['limits']['decode_64']:.1f}" in " ".join(texts(fig))
    assert [line.get_xdata()[0] for line in fig.axes[0].lines] == [record["limits"]["decode_64"]]  # type: ignore[index]
    assert png(fig)[:4] == b"\x89PNG"
