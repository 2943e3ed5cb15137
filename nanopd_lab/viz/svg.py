"""A figure as SVG for a page that has a light and a dark theme: ink, paper and grey are the page's own."""

from __future__ import annotations

import hashlib
import io
import re

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from nanopd_lab.viz.style import FAINT, INK, PAPER

# Black is matplotlib's own for axes and ticks.
THEMED = {
    INK: "--ink",
    "#000000": "--ink",
    "#ffffff": "--paper",
    PAPER: "--paper",
    FAINT: "--faint",
    "#b0b0b0": "--grid",
}


def inline_svg(fig: Figure, name: str) -> str:
    """The `<svg>` element, without prologue; it scales with its container and asks for no font.

    Args:
        name: of the figure on its page; its ids begin with it, so that those of two figures don't meet
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        FigureCanvasSVG(fig).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in THEMED.items():
        text = re.sub(f'(?<=[: ]){colour}(?=[;"])', f"var({variable})", text, flags=re.IGNORECASE)
    prefix = "f" + hashlib.sha256(name.encode()).hexdigest()[:6] + "-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href="|url\()#', rf"\1#{prefix}", text)
    width, height = (float(each) for each in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    return re.sub(
        r"<svg [^>]*>",
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:g} {height:g}" aria-hidden="true">',
        text,
        count=1,
    )
