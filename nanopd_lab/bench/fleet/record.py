"""The record of a study of fleets: which is the newest, what it says of controllers, and its rows as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanopd_lab.bench.fleet.controller_time import ControllerTimes, Point
from nanopd_lab.resources import data_dir

SCHEMA = "nanopd-lab/fleet/1"


def newest(folder: Path | None = None) -> Path:
    """The newest record in a folder (of the package's records). Raises ValueError if there is none."""
    found = sorted((folder or data_dir() / "recorded").glob("fleet-*.json"))
    if not found:
        raise ValueError(
            "no fleet is recorded; nanopd-lab simulate-fleet --measure --result-filename … makes a record"
        )
    return found[-1]


def load(path: Path | None = None) -> dict[str, Any]:
    """A record, or the newest one. Raises ValueError: it is another kind of file."""
    path = path or newest()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path.name} is no JSON, and is left as it is: {error}; name another file"
        ) from None
    if not isinstance(record, dict):
        raise ValueError(f"{path.name} is no record of a fleet; name a fleet-….json")
    if record.get("schema") != SCHEMA:
        raise ValueError(
            f"{path.name} has schema {record.get('schema')!r}, not {SCHEMA!r}; name a fleet-….json"
        )
    found: dict[str, Any] = record
    return found


def controllers(record: dict[str, Any]) -> list[Point]:
    """The controllers that were measured."""
    return [Point.of(each) for each in record.get("controllers", [])]


def times_of(path: Path | None = None) -> ControllerTimes:
    """Controllers' times as recorded."""
    return ControllerTimes(controllers(load(path)))


def controller_table(points: Sequence[Point]) -> str:
    """How many decisions, and requests with all their messages, a controller takes a second."""
    lines = ["workers  policy        a decision  a message  messages/request  decisions/s  requests/s"]
    lines += [
        f"{p.workers:7,}  {p.policy:12}  {1e6 * p.decision_s:7,.0f} us  {1e6 * p.message_s:6.1f} us  "
        f"{p.messages_per_request:16.1f}  {p.decisions_per_s:11,.0f}  {p.requests_per_s:10,.0f}"
        for p in points
    ]
    return "\n".join(lines)


def cell_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a cell."""
    lines = [
        "workers shards policy        req/s/GPU  what                                  controller  its queue "
        "(formula)   TTFT p99   in time  goodput/GPU"
    ]
    for row in rows:
        s = row["settings"]
        formula = row["formula_wait_s"]
        told = "for ever" if formula is None else f"{1e3 * formula:.2f}"
        late = ">" if row["censored"] else " "
        lines.append(
            f"{s['workers']:7,} {s['shards']:6} {s['policy']:13} {s['rate']:9g}  {what(s):36.36}  "
            f"{row['controller_load']:9.0%}  {1e3 * (row['mean_wait_s'] or 0):8.2f} ms ({told:>8}) "
            f"{late}{1e3 * row['p99_ttft_s']:7,.0f} ms  {row['in_time']:7.1%}  {row['goodput_per_worker']:7.2f}"
        )
    return "\n".join(lines)


def what(settings: dict[str, Any]) -> str:
    """What is special about a cell, in words."""
    found = []
    door, topology, failures = settings["door"], settings["topology"], settings["failures"]
    if settings["shards"] > 1:
        found.append(
            f"{door['name']}" + f" {door['digest_s']:g} s old" * (door["name"] in ("two-choices", "least"))
        )
    if topology:
        found.append(f"{topology['nic_bytes_per_s'] / 1.25e8:.0f} Gb/s {topology['oversubscription']:g}:1")
    if failures:
        found.append(f"failures x {failures['accelerate']:g}")
    if settings["controller_kill"]:
        found.append(f"one dies, given up in {settings['failover_s']:g} s")
    return ", ".join(found)
