"""Requests that a service recorded: when each came, and how long its prompt and its output were.

Read as they are published: Azure's LLM inference traces (`TIMESTAMP,ContextTokens,GeneratedTokens`), the same in
Vidur's layout (`arrived_at,num_prefill_tokens,num_decode_tokens`), BurstGPT (`Timestamp,Model,Request tokens,Response
tokens,...`), and Mooncake's JSON lines (`timestamp` in ms, `input_length`, `output_length`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from nanopd_lab.sim.workload import SimRequest, in_order

LAYOUTS = (
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("Timestamp", "Request tokens", "Response tokens"),
    ("timestamp", "input_length", "output_length"),
)


def read_trace(path: Path) -> list[SimRequest]:
    """In order of arrival, the first at 0 s; requests without a prompt or an output (failures) are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a layout that is not known, or a line that does not follow it.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows: Iterable[Mapping[str, Any]]
        if path.suffix in (".jsonl", ".json"):
            rows = (json.loads(line) for line in file if line.strip())
        else:
            rows = csv.DictReader(file)
        found, layout, number = [], None, 0
        try:
            for row in rows:
                number += 1
                layout = layout or _layout(row)
                when, prompt, output = (row[column] for column in layout)
                sizes = int(float(prompt)), int(float(output))
                if min(sizes) >= 1:
                    found.append((_seconds(when, layout[0]), *sizes))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name}: cannot be read at or after request {number}: {error}") from None
    if not found:
        raise ValueError(f"{path.name} holds no request with a prompt and an output")
    start = min(when for when, _, _ in found)
    return in_order(
        SimRequest(f"r{number}", when - start, prompt, output)
        for number, (when, prompt, output) in enumerate(found)
    )


def _layout(row: Mapping[str, Any]) -> tuple[str, str, str]:
    for layout in LAYOUTS:
        if all(column in row for column in layout):
            return layout
    known = "; ".join(", ".join(layout) for layout in LAYOUTS)
    raise ValueError(f"it has {', '.join(map(str, row))}; known are: {known}")


def _seconds(when: Any, column: str) -> float:
    if column == "timestamp":
        return float(when) / 1e3
    try:
        return float(when)
    except ValueError:
        # Azure's have seven digits behind the point, one more than datetime reads; all times are UTC.
        day, _, part = str(when).partition(".")
        digits = part.rstrip("Z").split("+")[0] or "0"
        return datetime.fromisoformat(f"{day[:19]}+00:00").timestamp() + float(f"0.{digits}")
