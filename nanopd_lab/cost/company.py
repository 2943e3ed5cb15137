"""What workers on one host cost one another.

Workers on a CPU share its memory and caches, so that a step takes longer while the others are in one too. An iteration
model that was fitted to steps timed in company is right for a host whose workers are all busy. This is the rest: what
part of that time a step takes alone. Decode steps read and prompts compute, and what they share is not the same, so
each kind has its own part. In between, time grows in a straight line with the number of others that are busy.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Company:
    """How much faster steps are while other workers of the host rest.

    processes:     busy ones in whose company the iteration model's steps were timed, the step's own among them
    decode_alone:  what a step of decodes only takes alone, as a part of its time in company
    prompt_alone:  the same of a step with prompt tokens

    Raises:
        ValueError: fewer than two processes, or a part that is not above 0 and at most 1.
    """

    processes: int
    decode_alone: float
    prompt_alone: float

    def __post_init__(self) -> None:
        if self.processes < 2:
            raise ValueError(f"company of {self.processes} processes; one has company from two on")
        for name in ("decode_alone", "prompt_alone"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is above 0 and at most 1")

    @classmethod
    def fit(
        cls,
        processes: int,
        decodes: Sequence[tuple[float, float]],
        prompts: Sequence[tuple[float, float]],
    ) -> Company:
        """To steps that were timed both ways: the median of what each kind takes alone.

        Args:
            processes: see the class
            decodes, prompts: (alone, in company), seconds; what is shorter in company counts as equal

        Raises:
            ValueError: no step of a kind, or one that took no time.
        """
        if not (decodes and prompts) or any(not (a > 0 and b > 0) for a, b in (*decodes, *prompts)):
            raise ValueError(
                f"{len(decodes)} decode steps and {len(prompts)} with prompts, timed alone and in company; one of each "
                "is needed at least, of more than 0 s"
            )
        parts = [min(1.0, statistics.median(a / b for a, b in kind)) for kind in (decodes, prompts)]
        return cls(processes, *parts)

    def speed(self, decodes_only: bool, others: int) -> float:
        """How many times as fast as the iteration model says a step is while so many other workers are busy; 1 where
        as many are as were profiled, or more.
        """
        if others >= self.processes - 1:
            return 1.0
        alone = self.decode_alone if decodes_only else self.prompt_alone
        return 1.0 / (alone + (1.0 - alone) * others / (self.processes - 1))
