"""One look for all figures: colours that everyone can tell apart, and a figure that shows itself.

Colours are Okabe and Ito's (2008). The same thing has the same colour in every notebook.
"""

from __future__ import annotations

import io
import re

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

INK = "#1F2328"
FAINT = "#6E7781"
PAPER = "#FFFFFF"
WAITING = "#C9CED4"
PREFILL = "#E69F00"
DECODE = "#0072B2"
KV = "#009E73"
ALERT = "#D55E00"

# Where requests are told apart; figures write their letter too. Dark ones carry white text.
REQUESTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#7F7F7F")

# Strategies, wherever they are compared; the learner's own is black. Any xPyD has one colour.
STRATEGIES = {
    "collocated": "#E69F00",
    "xPyD": "#0072B2",
    "round-robin": "#7F7F7F",
    "least-loaded": "#56B4E9",
    "threshold": "#CC79A7",
    "nanopd": "#D55E00",
    "adaptive": "#009E73",
    "oracle": "#C9CED4",
    "yours": "#000000",
}

DPI = 100


def strategy_colour(name: str) -> str:
    """Of a policy by its name: "2p2d" has that of xPyD, "threshold-512" and "adaptive:mean" those of their kind."""
    if re.fullmatch(r"\d+p\d+d|disaggregated", name):
        return STRATEGIES["xPyD"]
    return STRATEGIES.get(re.split(r"[-:](?!robin|loaded)", name)[0], FAINT)


class LabFigure(Figure):
    """A matplotlib figure without pyplot: no global state, and nothing to close. Notebooks show it as PNG."""

    def _repr_png_(self) -> bytes:
        return png(self)


def figure(width: float = 9.0, height: float = 4.0) -> LabFigure:
    """An empty figure on white: that reads in a light theme and in a dark one. Sizes in inches of 100 px."""
    return LabFigure(figsize=(width, height), dpi=DPI, facecolor=PAPER, layout="constrained")


def png(fig: Figure) -> bytes:
    """The figure as a PNG file of 256 colours: a third of the size, which counts in a committed notebook."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    buffer = io.BytesIO()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    pixels.quantize(256, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
