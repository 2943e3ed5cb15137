"""What workers on one host cost one another.

Workers on a CPU share its memory and caches, so that a step takes longer while the others are in one too. By how much
depends on both: decode steps read weights, prompts compute. A decode step beside another one waits for memory, beside a
prompt hardly at all; a prompt beside decode steps waits more than beside another prompt. (135M parameters in float32,
two workers on two cores of Zen 5: a decode step 24 ms alone, 24 to 26 beside a prompt, 29 beside another; a prompt of
112 tokens 200 ms, 204 beside another and 212 beside decodes.)

An iteration model that was fitted to steps timed beside steps of their own kind is right for a host whose workers all
do the same. This is the rest: what part of that time a step takes alone, and beside steps of the other kind. In
between, time grows in a straight line with the number of others of each kind.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Timed = tuple[float, float, float]
"""A step's time (s) alone, beside steps of its own kind and beside steps of the other kind."""


@dataclass(frozen=True)
class Company:
    """What a step takes as a part of its time while all other workers are in steps of the same kind.

    A step is of decodes only, or one with prompt tokens.

    processes:     busy ones in whose company the iteration model's steps were timed, the step's own among them
    decode_alone:  a step of decodes while others rest
    prompt_alone:  a step with prompt tokens while others rest
    decode_beside_prompts: a step of decodes while all others are in steps with prompt tokens
    prompt_beside_decodes: a step with prompt tokens while all others are in steps of decodes

    Raises:
        ValueError: fewer than two processes, or a part that is not above 0 and, alone, at most 1.
    """

    processes: int
    decode_alone: float
    prompt_alone: float
    decode_beside_prompts: float = 1.0
    prompt_beside_decodes: float = 1.0

    def __post_init__(self) -> None:
        if self.processes < 2:
            raise ValueError(f"company of {self.processes} processes; one has company from two on")
        for name in ("decode_alone", "prompt_alone"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is above 0 and at most 1")
        for name in ("decode_beside_prompts", "prompt_beside_decodes"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it is above 0 and finite")

    @classmethod
    def fit(cls, processes: int, decodes: Sequence[Timed], prompts: Sequence[Timed]) -> Company:
        """To steps that were timed in each company: the median part of each kind. None is shorter than alone.

        Args:
            processes: see the class

        Raises:
            ValueError: no step of a kind, or one that took no time.
        """
        if not (decodes and prompts) or any(not min(each) > 0 for each in (*decodes, *prompts)):
            raise ValueError(
                f"{len(decodes)} decode steps and {len(prompts)} with prompts, timed alone and in company; one of each "
                "is needed at least, of more than 0 s"
            )
        alone, beside = [], []
        for kind in (decodes, prompts):
            alone.append(min(1.0, statistics.median(a / own for a, own, _ in kind)))
            beside.append(max(alone[-1], statistics.median(other / own for _, own, other in kind)))
        return cls(processes, *alone, *beside)

    def speed(self, decodes_only: bool, decodes: int, prompts: int) -> float:
        """How many times as fast as the iteration model says a step is.

        Args:
            decodes_only: its kind
            decodes, prompts: how many other workers are in a step of each kind; as many as were profiled count at most
        """
        alone, in_decodes, in_prompts = (
            (self.decode_alone, 1.0, self.decode_beside_prompts)
            if decodes_only
            else (self.prompt_alone, self.prompt_beside_decodes, 1.0)
        )
        if not (others := decodes + prompts):
            return 1.0 / alone
        together = alone + (decodes * (in_decodes - alone) + prompts * (in_prompts - alone)) / max(
            others, self.processes - 1
        )
        return 1.0 / together
