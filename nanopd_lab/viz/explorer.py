"""A figure with controls. Importing this needs ipywidgets.

    Explorer(view, step=ipywidgets.IntSlider(min=0, max=10))     # shows view(step=0), and then whatever is set

An Image whose bytes are replaced does not flicker, needs no front end to test (`image.value` changes at
once) and saves nothing in the notebook; `interact` and `Output` do worse on all three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from nanopd_lab.viz.style import png


class Explorer(ipywidgets.VBox):
    """Controls above the figure that `view(**values)` draws.

    Args:
        view: a pure function that takes the controls' values by name
        width: of the image in pixels; it shrinks with the window
        controls: ipywidgets with a `value`, by the name of the argument that they set

    Raises:
        whatever `view` raises for the first values; later errors are shown below the figure
    """

    def __init__(self, view: Callable[..., Figure], *, width: int = 960, **controls: Any) -> None:
        self._view = view
        self.controls = controls
        self.image = ipywidgets.Image(
            format="png", layout=ipywidgets.Layout(width=f"{width}px", max_width="100%", height="auto")
        )
        self.error = ipywidgets.Label()
        self.error.add_class("plot-error")
        for control in controls.values():
            control.observe(self._update, "value")
        self._draw()
        super().__init__([*controls.values(), self.image, self.error])

    def _draw(self) -> None:
        self.image.value = png(self._view(**{name: control.value for name, control in self.controls.items()}))

    def _update(self, change: object) -> None:
        try:
            self._draw()
            self.error.value = ""
        except Exception as error:  # a callback's error would only reach the log console
            self.error.value = f"{type(error).__name__}: {error}"


def player(view: Callable[..., Figure], *, last: int, start: int = 0, interval_ms: int = 700) -> Explorer:
    """An `Explorer` with the slider `step` from 0 to `last`, and buttons that run it."""
    slider = ipywidgets.IntSlider(value=start, min=0, max=last, description="step")
    buttons = ipywidgets.Play(value=start, min=0, max=last, interval=interval_ms)
    ipywidgets.jslink((buttons, "value"), (slider, "value"))
    explorer = Explorer(view, step=slider)
    explorer.children = (buttons, *explorer.children)
    return explorer
