"""What one step of the engine is made of on a GPU, from a record of `nanopd-lab bench-engine`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from matplotlib.patches import Patch

from nanopd_lab.resources import data_dir
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, KV, WAITING, LabFigure, figure

RECORDED = "engine-qwen3-8b-nvidia-h100-2026-11-25.json"
MODES = {
    "eager": "eager: every operator launched",
    "off": "one CUDA graph, stacked products",
    "default": "and small operators compiled",
}
PARTS = (
    ("products", "products: the weights are read", DECODE, ""),
    ("attention", "attention and KV store", KV, ""),
    ("other", "norms, rotary, activation, sampling", ALERT, ""),
    ("idle", "GPU idle: waiting for the host", WAITING, "///"),
)


def recorded_engine(name: str = RECORDED) -> dict[str, Any]:
    """A record from `data/recorded`."""
    found: dict[str, Any] = json.loads((data_dir() / "recorded" / name).read_text(encoding="utf-8"))
    return found


def step_parts(record: Mapping[str, Any], mode: str, step: str = "decode_64") -> dict[str, float]:
    """Milliseconds of a step by part. What no kernel fills of the measured step counts as idle."""
    found = record["modes"][mode]
    parts = {name: found["breakdown"][step]["by_kind_us"].get(name, 0.0) / 1e3 for name, *_ in PARTS[:-1]}
    return {**parts, "idle": max(0.0, found[step] - sum(parts.values()))}


def step_breakdown(record: Mapping[str, Any], batch: int = 64) -> LabFigure:
    """A bar for each mode, on the whole scale and from close up; the line is what reading the bytes takes.

    Args:
        batch: of a decode step that the record breaks down. (Kernels of small steps overlap, so that their times
            add up to more than the step: only a batch where they don't makes a readable bar.)
    """
    step = f"decode_{batch}"
    modes = {name: label for name, label in MODES.items() if name in record["modes"]}
    limit = record["limits"][step]
    fig = figure(9.6, 3.6)
    whole, close = fig.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
    longest = max(record["modes"][name][step] for name in modes)
    near = sorted(record["modes"][name][step] for name in modes)[-2] if len(modes) > 1 else longest
    for ax, right in ((whole, 1.12 * longest), (close, 1.18 * near)):
        for row, name in enumerate(modes):
            left = 0.0
            for part, _, colour, hatch in PARTS:
                width = step_parts(record, name, step)[part]
                ax.barh(row, width, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
                left += width
            total = record["modes"][name][step]
            if total <= right:
                ax.text(left + 0.01 * right, row, f"{total:.1f}", va="center", fontsize=10, color=INK)
        ax.axvline(limit, color=INK, linestyle="--", linewidth=1.2)
        ax.set_xlim(0, right)
        ax.set_xlabel("one decode step (ms)")
        ax.spines[["top", "right"]].set_visible(False)
    whole.set_yticks(range(len(modes)), list(modes.values()))
    whole.invert_yaxis()
    close.text(limit, -0.62, f" reading all bytes once: {limit:.1f}", fontsize=9, color=FAINT, va="center")
    whole.set_title("the whole scale", loc="left", fontsize=11, color=INK)
    close.set_title("from close up", loc="left", fontsize=11, color=INK)
    handles = [Patch(facecolor=c, hatch=h, edgecolor="white", label=label) for _, label, c, h in PARTS]
    fig.suptitle(
        f"{record['model'].removeprefix('random:')}, batch {batch}, context {record['context']}, on an "
        f"{record['device']} (recorded {record['provenance']['date'][:10]})",
        fontsize=11,
        color=INK,
    )
    fig.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return fig
