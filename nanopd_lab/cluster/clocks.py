"""Several hosts have several clocks: how far a worker's is from the controller's, and its times put on the latter.

`time.monotonic()` counts from an arbitrary moment, which processes of one machine share and machines do not. Nothing
that a worker decides depends on another's clock: leases, deadlines of pulls and heartbeats are measured where they are
judged. What crosses is what it reports, its accounts and steps, and these are translated when they arrive.

Every message that went bounds the offset from above, for it took time; every one that came, from below (the intervals
of Marzullo's algorithm, which NTP uses). The tightest bounds are kept, and widened by how far two clocks may drift
apart; so the true offset always lies between them, and the middle is off by half their distance at most.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from nanopd_lab.cluster.messages import Ended

MAX_DRIFT = 1e-3  # seconds a second, of two clocks that are both slewed by up to 500 ppm, as Linux allows


@dataclass(frozen=True)
class Ping:
    """Asks for a `Pong`. `sent` is on the controller's clock."""

    sent: float


@dataclass(frozen=True)
class Pong:
    """Answers a `Ping`; `received` and `replied` are on the worker's clock."""

    sent: float
    received: float
    replied: float

    @classmethod
    def to(cls, ping: Ping) -> Pong:
        """Answer at once."""
        now = time.monotonic()
        return cls(ping.sent, now, now)


class Reading(NamedTuple):
    """A worker's clock minus the controller's, in seconds, and how far off that is at most."""

    offset_s: float
    error_s: float


SAME_CLOCK = Reading(0.0, 0.0)


class ClockOffset:
    """Of one worker's clock, from the exchanges with it. Sans-IO.

    Args:
        drift: seconds a second by which the two clocks may part
    """

    def __init__(self, drift: float = MAX_DRIFT) -> None:
        self._drift = drift
        self._low, self._low_at = float("-inf"), 0.0
        self._high, self._high_at = float("inf"), 0.0

    def observe(self, pong: Pong, arrived: float) -> None:
        """Take in an answer, which arrived at this time of the controller's clock."""
        low, high = self._bounds(arrived)
        widening = (arrived - pong.sent) * self._drift  # it holds for some moment since it was sent
        if (observed := pong.replied - arrived) - widening > low:
            self._low, self._low_at = observed, pong.sent
        if (observed := pong.received - pong.sent) + widening < high:
            self._high, self._high_at = observed, pong.sent

    def _bounds(self, now: float) -> tuple[float, float]:
        return (
            self._low - abs(now - self._low_at) * self._drift,
            self._high + abs(now - self._high_at) * self._drift,
        )

    def read(self, now: float) -> Reading:
        """The offset as known now, on the controller's clock.

        Raises:
            ValueError: nothing has been observed.
        """
        low, high = self._bounds(now)
        if low == float("-inf") or high == float("inf"):
            raise ValueError("no exchange with this clock yet; observe one first")
        return Reading((low + high) / 2, max(0.0, (high - low) / 2))


def clock_identity() -> str:
    """Processes with the same one share `time.monotonic()`: one boot of one machine, in one time namespace."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = ""
        with suppress(OSError):  # a kernel without time namespaces
            space = str(Path("/proc/self/ns/time").readlink())
        return f"{boot} {space}"
    return ""  # unknown: like no other


def on_our_clock(message: Any, offset_s: float) -> Any:
    """A worker's message with its times on the controller's clock."""
    return replace(message, usage=message.usage.shifted(-offset_s)) if isinstance(message, Ended) else message
