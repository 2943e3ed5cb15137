"""Which shard of a fleet a request goes to: at random, in turn, by its prompt's prefix, or where less seems to be open.

A front door is much simpler than a controller and sees much less: how much each shard had open per worker when it last
told, which each does every `digest_s` seconds, not all at the same moment. Two random choices of which the better one
is taken do nearly as well as looking at all (Azar et al., STOC 1994; Mitzenmacher, 2001), and with old news better:
whoever looks at all sends everybody to the same one until the next news come (Mitzenmacher, How useful is old
information?, 2000).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from nanopd_lab.sim.clock import EventQueue, Kind
from nanopd_lab.sim.workload import SimRequest

RULES = ("random", "round-robin", "prefix", "two-choices", "least")


@dataclass(frozen=True)
class DoorRule:
    """How it chooses.

    name: one of RULES; "prefix": requests whose prompts begin alike go to the same shard; "least" looks at all
    digest_s: between two reports of a shard; 0: it sees what is

    Raises:
        ValueError: an unknown rule, or a negative age.
    """

    name: str = "random"
    digest_s: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"front door {self.name!r}; choose one of {', '.join(RULES)}")
        if not 0 <= self.digest_s < float("inf"):
            raise ValueError(f"digest age {self.digest_s} s; it must be finite and not negative")

    @property
    def looks(self) -> bool:
        """True if it needs to know what the shards have."""
        return self.name in ("two-choices", "least")

    def __str__(self) -> str:
        return f"{self.name}, {self.digest_s:g} s" if self.looks else self.name


class FrontDoor:
    """See the module.

    Args:
        rule: how it chooses
        sizes: workers of each shard
        load: jobs that a shard has open now
        queue: the clock
        seed: of its dice
    """

    def __init__(
        self,
        rule: DoorRule,
        sizes: Sequence[int],
        load: Callable[[int], int],
        queue: EventQueue,
        seed: int = 0,
    ) -> None:
        self.rule, self.sizes, self.load, self.queue = rule, sizes, load, queue
        self.up = list(range(len(sizes)))  # shards that it sends to
        self.seen = [0.0] * len(sizes)  # jobs per worker, at the last report
        self._rng = random.Random(f"front door {seed}")
        self._turn = 0
        if rule.looks and rule.digest_s and len(sizes) > 1:
            for shard in self.up:
                phase = rule.digest_s * (shard + 1) / len(sizes)
                queue.push(queue.now + phase, Kind.WAKE, partial(self._report, shard))

    def _report(self, shard: int, _: int) -> None:
        self.seen[shard] = self.load(shard) / self.sizes[shard]
        self.queue.push(self.queue.now + self.rule.digest_s, Kind.WAKE, partial(self._report, shard))

    def choose(self, request: SimRequest) -> int | None:
        """A shard; None if none is up."""
        up, rng = self.up, self._rng
        if len(up) < 2:
            return up[0] if up else None
        name = self.rule.name
        if name == "round-robin":
            self._turn += 1
            return up[self._turn % len(up)]
        if name == "prefix":
            return self._by_prefix(request)
        if name == "random":
            return up[rng.randrange(len(up))]
        candidates = rng.sample(up, 2) if name == "two-choices" else rng.sample(up, len(up))
        if self.rule.digest_s:
            return min(candidates, key=self.seen.__getitem__)
        return min(candidates, key=lambda shard: self.load(shard) / self.sizes[shard])

    def _by_prefix(self, request: SimRequest) -> int:
        """The same one for all prompts that begin alike; the next one if that is away."""
        shared = request.shared()
        key = f"prefix {shared[0][0]}" if shared else request.request_id
        place = zlib.crc32(key.encode()) % len(self.sizes)
        known = set(self.up)
        while place not in known:
            place = (place + 1) % len(self.sizes)
        return place

    def away(self, shard: int) -> None:
        """Send nothing there any more."""
        if shard in self.up:
            self.up.remove(shard)

    def back(self, shard: int) -> None:
        """It serves again, and has nothing yet."""
        if shard not in self.up:
            self.up = sorted([*self.up, shard])
            self.seen[shard] = 0.0
