"""The dashboard of a run that goes on, as text: HTML with small SVG lines, made in a fraction of a millisecond.

A figure takes hundreds of times as long to draw, which on a CPU would be taken from what is measured. What it shows is
what `viz.cockpit_view` shows of a recording.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from nanopd_lab.bench.frames import Frame, WorkerFrame
from nanopd_lab.router.slo import Slo
from nanopd_lab.viz.cockpit_view import PHASES, phase_counts, shown_workers
from nanopd_lab.viz.style import ALERT, DECODE, FAINT, INK, KV, PAPER, PREFILL, WAITING

BAR_PX, KV_PX = 300, 120
LINE_PX = (285, 64)
POINTS = 60  # of a line
SCALE_FRAMES = 40  # the newest, which the bars fit in
FEW = 8  # requests: shorter bars than these fill nothing
_LEGEND = "".join(
    f'<span style="display:inline-block;width:.8em;height:.8em;background:{colour}"></span> {label} &nbsp; '
    for _, label, colour, _ in PHASES
)


def page(frames: Sequence[Frame], slo: Slo, window_s: float, note: str = "") -> str:
    """HTML of the last of these frames; the lines go over all of them.

    Args:
        note: in small print below
    """
    now = frames[-1]
    most = max(FEW, *(max(each.queued, *map(_jobs, shown_workers(each))) for each in frames[-SCALE_FRAMES:]))
    rows = [_row("queue", "in the controller", _bar([now.queued], [WAITING], most), f"{now.queued} wait", "")]
    rows += [_worker(worker, most) for worker in shown_workers(now)]
    routes = " &nbsp; ".join(
        f"<b>{escape(name or 'none')}</b> {count}" for name, count in sorted(now.routes.items())
    )
    past = frames[:: -max(1, len(frames) // POINTS)][::-1]  # the newest is one of them
    return (
        f'<div class="cockpit-page" style="background:{PAPER};color:{INK};max-width:940px;padding:8px 12px;'
        'border:1px solid #D0D7DE;border-radius:6px;font:13px/1.5 sans-serif">'
        f"<div>{_numbers(now)}</div>"
        f'<table style="border-spacing:8px 2px;border-collapse:separate;background:{PAPER}">{"".join(rows)}</table>'
        f'<div style="color:{FAINT};font-size:11px">{_LEGEND}</div>'
        f"<div>ended, by route: {routes or '–'}</div>"
        f"<div>{_line('TTFT (ms)', [(f.time_s, _ms(f.rolling.ttft_s)) for f in past], 1e3 * slo.ttft_s, PREFILL)}"
        f"{_line('TPOT (ms)', [(f.time_s, _ms(f.rolling.tpot_s)) for f in past], 1e3 * slo.tpot_s, DECODE)}"
        f"{_line('in time (requests/s)', [(f.time_s, f.rolling.goodput) for f in past], math.inf, KV)}</div>"
        f'<div style="color:{FAINT};font-size:11px">medians and rates over the last {window_s:g} s; '
        f"dashed: promised. {escape(note)}</div></div>"
    )


def _numbers(now: Frame) -> str:
    failed = f' · <b style="color:{ALERT}">{now.failed} failed</b>' if now.failed else ""
    share = now.rolling.goodput / now.rolling.completed if now.rolling.completed else None
    in_time = "–" if share is None else f"{share:.0%}"
    return (
        f"<b>{now.time_s:.1f} s</b> · {now.sent} sent · {now.running} running · {now.completed} completed{failed} · "
        f"<b>{in_time}</b> in time"
    )


def _jobs(worker: WorkerFrame) -> int:
    return sum(phase_counts(worker))


def _worker(worker: WorkerFrame, most: int) -> str:
    counts = phase_counts(worker)
    bar = _bar(counts, [colour for _, _, colour, _ in PHASES], most)
    words = ", ".join(
        f"{count} {label}" for count, (_, label, *_) in zip(counts, PHASES, strict=True) if count
    )
    kv = ""
    if worker.kv_total:
        share = worker.kv_used / worker.kv_total
        kv = (
            f'<span style="display:inline-block;width:{KV_PX}px;background:#EAEEF2"><span style="display:block;'
            f'height:.7em;width:{KV_PX * share:.0f}px;background:{KV}"></span></span> KV {share:.0%}'
        )
    role = (
        f'<span style="color:{ALERT}">{worker.role}</span>' if worker.role in ("starting", "gone") else None
    )
    return _row(worker.name, role or worker.role, bar, words or "idle", kv)


def _row(name: str, role: str, bar: str, words: str, kv: str) -> str:
    return (
        f"<tr><td><b>{escape(name)}</b></td><td>{role}</td>"
        f'<td style="width:{BAR_PX}px;white-space:nowrap">{bar}</td><td style="width:15em">{words}</td>'
        f'<td style="white-space:nowrap">{kv}</td></tr>'
    )


def _bar(counts: Sequence[int], colours: Sequence[str], most: int) -> str:
    return "".join(
        f'<span style="display:inline-block;height:.9em;width:{BAR_PX * count / most:.0f}px;background:{colour}">'
        "</span>"
        for count, colour in zip(counts, colours, strict=True)
        if count
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _line(name: str, points: Sequence[tuple[float, float | None]], limit: float, colour: str) -> str:
    """A line of its own scale, its newest value in words, and what was promised."""
    width, height = LINE_PX
    begin, end = points[0][0], max(points[-1][0], points[0][0] + 1e-9)
    known = [(time, value) for time, value in points if value is not None]
    promised = math.isfinite(limit)
    top = 1.15 * max([1e-9, *(value for _, value in known), limit if promised else 0.0])
    path = " ".join(
        f"{width * (time - begin) / (end - begin):.1f},{height * (1 - value / top):.1f}"
        for time, value in known
    )
    level = height * (1 - limit / top) if promised else 0.0
    dashes = (
        f'<line x1="0" x2="{width}" y1="{level:.1f}" y2="{level:.1f}" stroke="{INK}" stroke-dasharray="4 3"/>'
    )
    newest = points[-1][1]
    missed = promised and newest is not None and newest > limit
    words = "–" if newest is None else f"{newest:,.1f}" if newest < 100 else f"{newest:,.0f}"
    return (
        f'<span style="display:inline-block;margin:4px 14px 0 0">{name} '
        f'<b style="color:{ALERT if missed else INK}">{words}</b>'
        + (f' <span style="color:{FAINT}">of {limit:,.0f}</span>' if promised else "")
        + f'<svg width="{width}" height="{height}" style="display:block;border-bottom:1px solid {FAINT}">'
        + (dashes if promised else "")
        + f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/></svg>'
        f'<span style="color:{FAINT};font-size:11px">{begin:.0f} to {end:.0f} s</span></span>'
    )
