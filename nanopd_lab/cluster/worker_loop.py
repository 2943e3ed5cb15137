"""What a worker does in a process of its own, whoever started it: build, say hello, then turn after turn until it is
told to stop or the connection ends, so that no worker outlives its controller."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nanopd_lab.cluster.clocks import Ping, Pong
from nanopd_lab.cluster.lease import LeaseTerms
from nanopd_lab.engine.config import EngineConfig

BEAT_S = 0.5


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker's process needs to know."""

    name: str
    config: EngineConfig
    transport: str
    devices: tuple[str, ...]  # of all workers
    terms: LeaseTerms
    threads: int | None
    trace: bool
    life: int = 0


@dataclass(frozen=True)
class Stop:
    """End in order."""


@dataclass(frozen=True)
class Ask:
    """Answer with `Answer`: "check" (integrity, what is held) or "steps" (the record since the last time)."""

    what: str


@dataclass(frozen=True)
class Answer:
    """`value` is a `Findings` for "check", a list of `StepRecord` for "steps"."""

    what: str
    value: Any


@dataclass(frozen=True)
class StartFailed:
    """Instead of `Hello`."""

    error: str


def failure_of(error: BaseException) -> StartFailed:
    """What to say of an exception that is being handled."""
    return StartFailed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def run_worker(connection: Connection, spec: WorkerSpec) -> bool:
    """Serve until the end; the connection carries lists of messages both ways. False if it has ended by itself."""
    os.environ["TQDM_DISABLE"] = "1"  # the bars of several processes would write over each other
    try:
        import torch

        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        device = spec.config.resolve_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # no context on the first GPU for whoever forgets to name one
        from nanopd_lab.cluster.build import build_host
        from nanopd_lab.transfer.registry import create_transport

        transport = create_transport(spec.transport, devices=spec.devices)
        host, _ = build_host(spec.name, spec.config, transport, spec.terms, life=spec.life, trace=spec.trace)
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send([failure_of(error)])
        return True
    try:
        connection.send([host.hello()])
        host.post = connection.send
        _serve(connection, host)
        return True
    except (EOFError, OSError, KeyboardInterrupt):
        return False  # the controller is gone
    finally:
        host.close()


def _serve(connection: Connection, host: Any) -> None:
    next_beat = 0.0
    while True:
        messages: list[Any] = []
        answers: list[Any] = []
        # Go on at once after a step; while pulls are under way look often; else until something is due.
        pause = 0.0 if host.progressed else 0.0005 if host.busy else BEAT_S
        while connection.poll(pause):
            pause = 0.0
            for message in connection.recv():
                if isinstance(message, Ping):
                    connection.send([Pong.to(message)])
                elif isinstance(message, Ask):
                    answers.append(_answer(host, message.what))
                elif isinstance(message, Stop):
                    return
                else:
                    messages.append(message)
        found: list[Any] = host.turn(messages)
        now = time.monotonic()
        if now >= next_beat:
            next_beat = now + BEAT_S
            found.append(host.core.beat())
        if found or answers:
            connection.send([*found, *answers])


def _answer(host: Any, what: str) -> Answer:
    return Answer(what, host.taken_steps() if what == "steps" else host.check())
