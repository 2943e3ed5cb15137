"""Which lane touches which bytes, and what memory moves for it: drawn from accesses that the emulator recorded."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from nanopd_lab.kernels.report import Counters, WarpAccess
from nanopd_lab.viz.ladder import LABELS
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, KV, WAITING, LabFigure, figure

SECTOR = 32
WASTE = "#F7D9C4"  # ALERT, lightened: moved and not asked for


def sector_picture(
    accesses: Mapping[str, WarpAccess | None], total_bytes: int, row_bytes: int = 512
) -> LabFigure:
    """A panel an access: memory from left to right and top to bottom, a box for each sector of 32 bytes.

    Blue is what lanes asked for (dark: lane 0, pale: lane 31), orange what moved with it for nothing, grey what stayed.
    """
    known = {name: access for name, access in accesses.items() if access}
    rows = -(-total_bytes // row_bytes)
    fig = figure(9.6, 1.35 + (0.3 if rows > 8 else 0.36) * rows)
    panels = fig.subplots(1, max(1, len(known)), squeeze=False)[0]
    for ax, (name, access) in zip(panels, known.items(), strict=False):
        _memory(ax, access, rows, row_bytes)
        asked = access.bytes * sum(offset is not None for offset in access.offsets)
        moved = SECTOR * len(access.sectors)
        ax.set_title(
            f"{name}: {len(access.sectors)} sectors, {moved:,} bytes for {asked:,}", loc="left", fontsize=10.5
        )
    if not known:
        panels[0].axis("off")
        panels[0].text(0.5, 0.5, "nothing was run: there is no C++ compiler here", ha="center", color=INK)
        return fig
    legend = [
        Patch(facecolor=colormaps["Blues_r"](0.25), label="asked for (dark: lane 0, pale: lane 31)"),
        Patch(facecolor=WASTE, edgecolor=ALERT, label="moved for nothing"),
        Patch(facecolor="white", edgecolor=WAITING, label="not touched"),
    ]
    fig.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    return fig


def _memory(ax: Axes, access: WarpAccess, rows: int, row_bytes: int) -> None:
    moved = set(access.sectors)
    for sector in range(rows * row_bytes // SECTOR):
        x, y = sector * SECTOR % row_bytes, sector * SECTOR // row_bytes
        hit = sector in moved
        ax.add_patch(
            Rectangle(
                (x, y), SECTOR, 0.84, facecolor=WASTE if hit else "white", edgecolor=ALERT if hit else WAITING,
                linewidth=0.9 if hit else 0.6, zorder=2 if hit else 1,
            )
        )  # fmt: skip
    for lane, offset in enumerate(access.offsets):
        if offset is None or offset >= rows * row_bytes:
            continue
        x, y = offset % row_bytes, offset // row_bytes
        colour = colormaps["Blues_r"](0.1 + 0.65 * lane / 31)
        ax.add_patch(Rectangle((x, y + 0.06), access.bytes, 0.72, facecolor=colour, zorder=3))
        if access.bytes * 24 >= row_bytes:  # there is room for a number
            ink = "white" if lane < 18 else INK
            place = (x + access.bytes / 2, y + 0.44)
            ax.text(*place, str(lane), ha="center", va="center", fontsize=7, color=ink, zorder=4)
    ax.set(xlim=(-2, row_bytes + 2), ylim=(rows + 0.1, -0.15))
    ax.set_xticks(range(0, row_bytes + 1, row_bytes // 4))
    ax.set_yticks([row + 0.42 for row in range(0, rows, 1 if rows <= 8 else 4)])
    ax.set_yticklabels([f"{row * row_bytes:,}" for row in range(0, rows, 1 if rows <= 8 else 4)])
    ax.tick_params(labelsize=8.5, color=FAINT, length=2)
    ax.set_xlabel("+ bytes", fontsize=9)
    ax.set_ylabel("byte", fontsize=9)
    for side in ax.spines.values():
        side.set_visible(False)


def traffic_bars(counters: Mapping[str, Counters], needed_bytes: int) -> LabFigure:
    """What each rung reads from global memory, beside what must be read once, and how many lanes have work."""
    fig = figure(9.6, 1.5 + 0.42 * max(1, len(counters)))
    left, right = fig.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names = list(counters)
    moved = [SECTOR * counters[name].total("sectors", "global", "read") for name in names]
    busy = [c.lane_steps / (32 * c.steps) if c.steps else 0.0 for c in counters.values()]
    for row, size in enumerate(moved):
        left.barh(row, min(size, needed_bytes) / 1e3, color=KV, height=0.66)
        left.barh(
            row,
            max(0, size - needed_bytes) / 1e3,
            left=needed_bytes / 1e3,
            color=ALERT,
            height=0.66,
            alpha=0.55,
        )
        left.text(size / 1e3, row, f" {size / needed_bytes:.1f} ×", va="center", fontsize=10, color=INK)
        right.barh(row, 100 * busy[row], color=DECODE, height=0.66)
        right.text(100 * busy[row], row, f" {busy[row]:.0%}", va="center", fontsize=10, color=INK)
    left.axvline(needed_bytes / 1e3, color=INK, linewidth=1.2)
    left.set_xlim(0, 1.16 * max([*moved, needed_bytes]) / 1e3)
    right.set_xlim(0, 118)
    left.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names], fontsize=10)
    left.invert_yaxis()
    left.set_xlabel("read from global memory (kB); the line: K and V, once")
    right.set_xlabel("lanes that take part in a step (%)")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    return fig
