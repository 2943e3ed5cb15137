"""Pulls of KV blocks over network cards that they share.

A pull first takes `setup_s + blocks * block_s`, which nobody shares, and then sends its bytes. Each card divides its
bandwidth equally among the pulls that leave it (source) or arrive at it (target); the two directions are independent.
A pull goes at the smaller of its two shares; what a slower partner leaves unused is not given to others, so the model
errs to the slow side where shares differ (max-min fairness would redistribute it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.sim.clock import EventQueue, Kind

LinkModel = TransferModel
"""A pull's time over idle cards; `bytes_per_s` is that of each card and direction."""


@dataclass(eq=False, slots=True)
class Flow:
    """One pull under way; `payload` is the caller's. `rate` in bytes/s as of `since`, 0 during its setup."""

    source: str
    target: str
    started: float
    left_bytes: float
    payload: Any
    rate: float = 0.0
    since: float = 0.0
    turn: int = 0  # the order of the event at which its setup or its last byte is due
    sending: bool = False


@dataclass
class Links:
    """All pulls under way. `ended` is called for each that has been sent."""

    model: LinkModel
    queue: EventQueue
    ended: Callable[[Flow], None]
    leaving: dict[str, dict[Flow, None]] = field(default_factory=dict)  # ordered sets, by worker
    arriving: dict[str, dict[Flow, None]] = field(default_factory=dict)
    flows: dict[Flow, None] = field(default_factory=dict)

    def start(self, source: str, target: str, blocks: int, num_bytes: int, payload: Any) -> Flow:
        """Begin a pull of `blocks` blocks, `num_bytes` together."""
        now = self.queue.now
        flow = Flow(source, target, now, float(num_bytes), payload)
        self.flows[flow] = None
        setup_s = self.model.setup_s + blocks * self.model.block_s
        if setup_s or not self._send(flow):
            self._call(flow, now + setup_s)
        return flow

    def _due(self, flow: Flow, turn: int) -> None:
        if turn == flow.turn and not self._send(flow):  # else cancelled, or its rate has changed since
            self.end(flow)
            self.ended(flow)

    def _send(self, flow: Flow) -> bool:
        """The setup is over: begin to send the bytes. False if they have been sent, or take no time."""
        if flow.sending or not flow.left_bytes > 0 or self.model.bytes_per_s == math.inf:
            return False
        flow.sending = True
        self.leaving.setdefault(flow.source, {})[flow] = None
        self.arriving.setdefault(flow.target, {})[flow] = None
        self._share(flow)
        return True

    def end(self, flow: Flow) -> None:
        """Forget a pull, finished or not; the others go faster."""
        del self.flows[flow]
        flow.turn = 0
        if flow.sending:
            del self.leaving[flow.source][flow]
            del self.arriving[flow.target][flow]
            self._share(flow)

    def of_worker(self, name: str) -> list[Flow]:
        """Pulls from or to this worker."""
        return [flow for flow in self.flows if name in (flow.source, flow.target)]

    def _share(self, changed: Flow) -> None:
        """Divide the two cards that `changed` uses anew."""
        now = self.queue.now
        leaving, arriving = self.leaving[changed.source], self.arriving[changed.target]
        for flow in (*leaving, *(flow for flow in arriving if flow not in leaving)):
            most = max(len(self.leaving[flow.source]), len(self.arriving[flow.target]))
            rate = self.model.bytes_per_s / most
            if rate == flow.rate:
                continue
            flow.left_bytes = max(0.0, flow.left_bytes - flow.rate * (now - flow.since))
            flow.rate, flow.since = rate, now
            self._call(flow, now + flow.left_bytes / rate)

    def _call(self, flow: Flow, time: float) -> None:
        flow.turn = self.queue.push(time, Kind.PULL, partial(self._due, flow))
