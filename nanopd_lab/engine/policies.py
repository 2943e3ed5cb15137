"""Two decisions of the scheduler that are worth swapping: how to split a step's tokens, whom to preempt."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from nanopd_lab.core import Sequence


class ChunkPolicy(Protocol):
    """How many prompt tokens of each prefill go into this step."""

    def __call__(self, num_decodes: int, prefills: Seq[int], budget: int) -> list[int]:
        """Tokens for each prefill; never more than it has left, and in total at most `budget - num_decodes`."""
        ...


class VictimPolicy(Protocol):
    """Which sequence loses its blocks when the pool is full."""

    def __call__(self, running: Seq[Sequence]) -> Sequence:
        """One of `running` (never empty)."""
        ...


def plan_chunks(num_decodes: int, prefills: Seq[int], budget: int) -> list[int]:
    """First come, first served: decodes take one token each, then prompts fill what is left in order.

    This is the stall-free batching of Sarathi-Serve (Agrawal et al., OSDI 2024): running decodes are never
    held up by a prompt, and a prompt's chunk is cut to the room they leave.

    Args:
        num_decodes: sequences that get one token each in this step
        prefills: tokens that each prompt still needs, oldest first
        budget: tokens that one step may hold (`max_num_batched_tokens`)
    """
    room = budget - num_decodes
    chunks = []
    for remaining in prefills:
        count = max(0, min(remaining, room))
        chunks.append(count)
        room -= count
    return chunks


def choose_victim(running: Seq[Sequence]) -> Sequence:
    """The youngest. The oldest is then never preempted while others hold blocks, so it always finishes."""
    return max(running, key=lambda sequence: sequence.priority)
