"""Requests that a service recorded: when each came, and how long its prompt and its output were.

Read as they are published: Azure's LLM inference traces (`TIMESTAMP,ContextTokens,GeneratedTokens`), the same in
Vidur's layout (`arrived_at,num_prefill_tokens,num_decode_tokens`), BurstGPT (`Timestamp,Model,Request tokens,Response
tokens,...`), and Mooncake's JSON lines (`timestamp` in ms, `input_length`, `output_length`, and `hash_ids`, which
tell what prompts share).
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from nanopd_lab.sim.workload import FIRST_PROMPT_TOKEN, SimRequest, in_order

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
    found: list[tuple[float, int, int, tuple[int, ...]]] = []
    layout, line = None, 1
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            for line, text in _lines(file, path.suffix in (".jsonl", ".json")):  # noqa: B007 - the handler names it
                row = json.loads(text) if isinstance(text, str) else text
                if not isinstance(row, Mapping):
                    raise ValueError(f"{str(text)[:40]!r} is no JSON object")
                layout = layout or _layout(row)
                sizes = _tokens(row, layout[1]), _tokens(row, layout[2])
                if min(sizes) >= 1:
                    found.append((_seconds(row[layout[0]], layout[0]), *sizes, _hash_ids(row)))
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path.name}, line {line}: cannot be read: {why}") from None
    if not found:
        raise ValueError(f"{path.name} holds no request with a prompt and an output")
    start = min(when for when, *_ in found)
    return in_order(
        SimRequest(f"r{number}", when - start, prompt, output, hash_ids=hashes)
        for number, (when, prompt, output, hashes) in enumerate(found)
    )


def _lines(file: TextIO, json_lines: bool) -> Iterator[tuple[int, str | Mapping[str, Any]]]:
    """(number of the line, its text or its fields) of each that holds anything."""
    if json_lines:
        yield from ((line, text) for line, text in enumerate(file, 1) if text.strip())
    else:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, row


def _tokens(row: Mapping[str, Any], column: str) -> int:
    try:
        found = int(float(row[column]))
    except (ValueError, TypeError, OverflowError):
        found = -1
    if found < 0:
        raise ValueError(f"{column} is {row[column]!r}; it must be a number of tokens")
    return found


def _hash_ids(row: Mapping[str, Any]) -> tuple[int, ...]:
    found = tuple(row.get("hash_ids") or ())
    if not all(type(each) is int and 0 <= each < FIRST_PROMPT_TOKEN for each in found):
        raise ValueError(f"hash_ids {str(found)[:40]} are not all integers in [0, {FIRST_PROMPT_TOKEN})")
    return found


def _layout(row: Mapping[str, Any]) -> tuple[str, str, str]:
    for layout in LAYOUTS:
        if all(column in row for column in layout):
            return layout
    known = "; ".join(", ".join(layout) for layout in LAYOUTS)
    raise ValueError(f"it has {', '.join(map(str, row))}; known are: {known}")


def _seconds(when: Any, column: str) -> float:
    try:
        seconds = float(when) / (1e3 if column == "timestamp" else 1)
    except (ValueError, TypeError):
        pass
    else:
        if math.isfinite(seconds):
            return seconds
    try:
        # Azure's have seven digits behind the point, one more than datetime reads; all times are UTC.
        day, _, part = str(when).partition(".")
        digits = part.rstrip("Z").split("+")[0] or "0"
        return datetime.fromisoformat(f"{day[:19]}+00:00").timestamp() + float(f"0.{digits}")
    except ValueError:
        raise ValueError(f"{column} is {when!r}; write 2023-11-16 18:17:03.98, or seconds") from None
