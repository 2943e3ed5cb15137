"""Figures that a page takes in: their ids are their own, their ink is the page's."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from nanopd_lab.viz.style import DECODE, FAINT, INK, figure
from nanopd_lab.viz.svg import inline_svg


def drawn(name: str) -> str:
    fig = figure(4, 3)
    ax = fig.add_subplot()
    ax.plot([0, 1], [0, 1], color=INK)
    ax.plot([0, 1], [1, 0], color=DECODE, marker="o")
    ax.axhline(0.5, color=FAINT)
    ax.set_xlabel("time (ms)")
    return inline_svg(fig, name)


def test_it_is_one_element_that_scales() -> None:
    root = ElementTree.fromstring(drawn("a"))
    assert root.tag.endswith("}svg")
    assert {"width", "height"}.isdisjoint(root.attrib)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    assert width / height == 4 / 3


def test_ink_paper_and_grey_are_the_pages_and_other_colours_stay() -> None:
    text = drawn("a").lower()
    assert not re.findall("#000000|#ffffff|#1f2328|#6e7781", text)
    for variable in ("--ink", "--paper", "--faint"):
        assert f"var({variable})" in text
    assert DECODE.lower() in text


def test_two_figures_share_no_id_and_all_references_are_met() -> None:
    first, second = drawn("a"), drawn("b")
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, second)]
    assert ids[0].isdisjoint(ids[1])
    for text, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', text)) <= own


def test_the_same_figure_gives_the_same_file() -> None:
    assert drawn("a") == drawn("a")
