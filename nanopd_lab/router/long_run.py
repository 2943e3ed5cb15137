"""What the long run is like: arrivals over longer than a plan looks at, and queues that grow too slowly for it to see.

A plan serves the arrivals of half a second or so again, and in so short a time a queue that grows for ever keeps its
promises still. Whether it would is a matter of rates: a fluid limit (Newell, Applications of Queueing Theory, 1982).
"""

from __future__ import annotations


class LongRun:
    """Tokens of prompts a second; a request counts less and less, until about so many others have come."""

    def __init__(self, arrivals: int) -> None:
        self._kept = 1 - 1 / arrivals
        self._tokens = self._seconds = 0.0
        self._last: float | None = None

    def arrived(self, now: float, tokens: int) -> None:
        """A request has come, with a prompt of so many tokens."""
        if self._last is not None:
            self._seconds = self._seconds * self._kept + now - self._last
            self._tokens = self._tokens * self._kept + tokens
        self._last = now

    def begin_again(self, tokens: int, seconds: float) -> None:
        """What came so far is not like what comes now: forget all but so many tokens in so many seconds."""
        self._tokens, self._seconds = float(tokens), seconds

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0.0 else 0.0


def lasting(load: float, room_s: float, going_s: float) -> float:
    """The share of prompts with a first token in time, if they come faster than they can be computed.

    A queue grows by `load` - 1 seconds of work a second until it is as long as anybody can wait for. From then on only
    as many are in time as there is time for.

    Args:
        load: prompts that come while one is computed
        room_s: by which the queue may grow
        going_s: for how long this goes on
    """
    if load <= 1.0 or going_s <= 0.0:
        return 1.0
    full_s = max(0.0, room_s) / (load - 1.0)
    return 1.0 if going_s <= full_s else 1.0 - (1.0 - 1.0 / load) * (1.0 - full_s / going_s)
