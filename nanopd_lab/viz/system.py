"""The map of the system: what a request passes on its way, and, for one step, where everything is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

from nanopd_lab.engine.trace import StepRecord, Trace
from nanopd_lab.viz.style import DECODE, FAINT, INK, KV, PAPER, WAITING, LabFigure, figure


@dataclass(frozen=True)
class Box:
    """A part of the system. Positions in percent of the width; `notebook` is where it is built."""

    x: float
    y: float
    width: float
    height: float
    title: str
    place: str
    notebook: str
    colour: str = INK
    later: bool = False


QUEUE = Box(1, 25, 17, 16, "Requests", "core.py", "00", WAITING)
SCHEDULER = Box(26, 25, 19, 16, "Scheduler", "engine/", "05")
RUNNER = Box(53, 25, 19, 16, "Model runner", "model/, attention/", "01, 03, 04")
ANSWERS = Box(81, 25, 18, 16, "Answers", "engine/outputs.py", "00", WAITING)
ALLOCATOR = Box(26, 2, 19, 14, "Block allocator", "kv/", "02", KV)
POOL = Box(53, 2, 46, 14, "KV cache: one pool of blocks", "kv/cache.py", "02", KV)
ROUTER = Box(1, 48, 44, 8, "Router and controller", "router/, cluster/", "08, 09", FAINT, later=True)
PEER = Box(53, 48, 46, 8, "Another worker, fed with KV blocks", "transfer/", "06", FAINT, later=True)
COST = Box(1, 2, 17, 14, "Cost model", "cost/, sim/", "07", FAINT, later=True)
BOXES = (QUEUE, SCHEDULER, RUNNER, ANSWERS, ALLOCATOR, POOL, ROUTER, PEER, COST)


def system_map(trace: Trace | None = None, step: int = 0, whole: bool = False) -> LabFigure:
    """The parts of the engine and how a request travels; with a trace, how things stood after one step.

    Args:
        trace: a recorded run, or None for the map alone
        step: which of the run's steps, 1 for the first; 0 for the moment before it
        whole: everything runs, nothing comes later
    """
    fig = figure(9.6, 5.4)
    ax = fig.add_subplot(xlim=(0, 100), ylim=(0, 58))
    ax.set_axis_off()
    for box in BOXES:
        _draw(ax, replace(box, later=False) if whole else box, detailed=trace is None)
    _arrows(ax, later=not whole)
    if trace is None and not whole:
        ax.text(
            40,
            44.6,
            "solid: what runs in this notebook     dashed: what later ones add",
            ha="center",
            va="center",
            fontsize=9,
            color=FAINT,
        )
    if trace is not None:
        if not 0 <= step <= len(trace.steps):
            raise ValueError(f"step is {step}; this run has steps 1 to {len(trace.steps)}, and 0 before them")
        _live(ax, trace, step)
    return fig


def _draw(ax: Axes, box: Box, detailed: bool) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (box.x, box.y),
            box.width,
            box.height,
            boxstyle="round,pad=0,rounding_size=1.2",
            facecolor=PAPER,
            edgecolor=box.colour if box.colour != WAITING else FAINT,
            linewidth=1.2 if box.later else 2,
            linestyle="--" if box.later else "-",
        )
    )
    ink = FAINT if box.later else INK
    top, middle = box.y + box.height, box.x + box.width / 2
    ax.text(middle, top - 2.9, box.title, ha="center", va="center", fontsize=11, weight="bold", color=ink)
    if detailed or box.later:
        tail = f"notebook {box.notebook}" if "," not in box.notebook else f"notebooks {box.notebook}"
        if box.height < 10:
            ax.text(
                middle,
                box.y + 2.3,
                f"{box.place}  ·  {tail}",
                ha="center",
                va="center",
                fontsize=9,
                color=ink,
            )
        else:
            ax.text(
                middle,
                box.y + 5.9,
                box.place,
                ha="center",
                va="center",
                fontsize=9,
                color=ink,
                family="monospace",
            )
            ax.text(middle, box.y + 2.5, tail, ha="center", va="center", fontsize=9, color=ink)


def _arrows(ax: Axes, later: bool) -> None:
    """`later`: between workers nothing flows yet."""

    def arrow(
        start: tuple[float, float], end: tuple[float, float], later: bool = False, bend: float = 0
    ) -> None:
        style = {
            "arrowstyle": "-|>",
            "color": FAINT if later else INK,
            "linewidth": 1.2 if later else 1.6,
            "linestyle": "--" if later else "-",
            "connectionstyle": f"arc3,rad={bend}",
            "shrinkA": 1,
            "shrinkB": 1,
        }
        ax.annotate("", xy=end, xytext=start, arrowprops=style)

    def label(x: float, y: float, text: str) -> None:
        ax.text(x, y, text, ha="center", va="center", fontsize=9, color=INK)

    arrow((18, 33), (26, 33))
    arrow((45, 35), (53, 35))
    label(49, 37, "plan")
    arrow((53, 30), (45, 30))
    label(49, 28, "tokens")
    arrow((72, 33), (81, 33))
    label(76.5, 35, "text")
    arrow((35.5, 25), (35.5, 16))
    label(32.2, 20.5, "blocks")
    arrow((62.5, 25), (62.5, 16))
    label(57.8, 20.5, "write K, V")
    arrow((66, 16), (66, 25))
    label(72.5, 20.5, "attend to all")
    arrow((9.5, 48), (9.5, 41), later=later)
    arrow((70, 48), (70, 41), later=later)
    arrow((70, 41), (70, 48), later=later)


def _live(ax: Axes, trace: Trace, step: int) -> None:
    """Numbers, and one square for each block in use."""
    now = trace.steps[step - 1] if step else StepRecord(0, 0, (), len(trace.outputs), 0, 0, 0)

    def big(box: Box, number: str, caption: str, colour: str = INK) -> None:
        middle = box.x + box.width / 2
        ax.text(
            middle, box.y + 7.8, number, ha="center", va="center", fontsize=17, weight="bold", color=colour
        )
        ax.text(middle, box.y + 2.9, caption, ha="center", va="center", fontsize=9, color=INK)

    big(QUEUE, str(now.waiting), "waiting")
    big(SCHEDULER, str(now.running), "running")
    big(ANSWERS, str(now.finished), f"of {len(trace.outputs)} finished")
    prefill = sum(work.tokens for work in now.work if work.phase == "prefill")
    decode = sum(work.tokens for work in now.work if work.phase == "decode")
    middle = RUNNER.x + RUNNER.width / 2
    ax.text(
        middle,
        RUNNER.y + 9,
        f"{prefill} prompt tokens",
        ha="center",
        va="center",
        fontsize=11,
        color="#8A5F00" if prefill else FAINT,
        weight="bold" if prefill else "normal",
    )
    ax.text(
        middle,
        RUNNER.y + 5.9,
        f"{decode} answer tokens",
        ha="center",
        va="center",
        fontsize=11,
        color=DECODE if decode else FAINT,
        weight="bold" if decode else "normal",
    )
    took = f"in {now.seconds * 1e3:.0f} ms" if step else "not started"
    ax.text(middle, RUNNER.y + 2.5, took, ha="center", va="center", fontsize=9, color=INK)
    big(ALLOCATOR, str(now.blocks_used), f"of {trace.num_blocks:,} blocks in use", KV)
    _squares(ax, now.blocks_used, max((record.blocks_used for record in trace.steps), default=0))
    ended = f"step {step} of {len(trace.steps)}" + (
        f", {now.start_s + now.seconds:.2f} s after the start" if step else ""
    )
    ax.text(40, 44.6, ended, ha="center", va="center", fontsize=11, color=INK, weight="bold")


def _squares(ax: Axes, used: int, most: int) -> None:
    """Two rows of squares, as many as the run needed at its peak; filled ones are in use now."""
    columns = max(24, -(-most // 2))
    side = 43 / columns
    for index in range(2 * columns):
        column, row = index // 2, index % 2
        ax.add_patch(
            Rectangle(
                (POOL.x + 1.5 + column * side, POOL.y + 5.6 - row * 4.2),
                side * 0.82,
                3.3,
                facecolor=KV if index < used else PAPER,
                edgecolor=KV,
                linewidth=0.8,
            )
        )
