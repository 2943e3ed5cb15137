"""Which steps to time: prefill, decode and mixed batches that cover what a scheduler can plan.

No torch. Points come from lists and from a seeded generator, so that a profile can be continued another day.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nanopd_lab.cost.roofline import ChunkShape

KINDS = ("prefill", "decode", "mixed")


@dataclass(frozen=True)
class Point:
    """A step to time; `kind` is one of KINDS."""

    kind: str
    chunks: tuple[ChunkShape, ...]

    def blocks(self, block_size: int) -> int:
        """KV blocks that it holds."""
        return sum(-(-(chunk.past + chunk.count) // block_size) for chunk in self.chunks)

    @property
    def tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    def to_record(self) -> dict[str, Any]:
        """JSON-ready: each chunk as [count, past, samples]."""
        return {"kind": self.kind, "chunks": [[c.count, c.past, c.samples] for c in self.chunks]}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Point:
        """What `to_record` made."""
        return cls(str(record["kind"]), tuple(ChunkShape(*chunk) for chunk in record["chunks"]))


@dataclass(frozen=True)
class Grid:
    """Sizes in tokens; a point is dropped where it is over what the engine can hold.

    prefill_counts × pasts, batches × contexts, and `num_mixed` random steps of up to `max(batches)` decodes and one or
    two prompt chunks of `max(prefill_counts)` tokens together at most.
    """

    prefill_counts: tuple[int, ...]
    pasts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    num_mixed: int
    seed: int = 0

    def points(self, max_tokens: int, max_blocks: int, max_len: int, block_size: int) -> list[Point]:
        """All that fit, in a fixed order.

        Args:
            max_tokens: of a step
            max_blocks: of the pool
            max_len: of a sequence
        """

        def fits(point: Point) -> bool:
            longest = max(chunk.past + chunk.count for chunk in point.chunks)
            return (
                point.tokens <= max_tokens and longest <= max_len and point.blocks(block_size) <= max_blocks
            )

        return [point for point in (*self._prefills(), *self._decodes(), *self._mixed()) if fits(point)]

    def _prefills(self) -> Iterable[Point]:
        for past in self.pasts:
            for count in self.prefill_counts:
                yield Point("prefill", (ChunkShape(count, past),))

    def _decodes(self) -> Iterable[Point]:
        for context in self.contexts:
            for batch in self.batches:
                yield Point("decode", (ChunkShape(1, context),) * batch)

    def _mixed(self) -> Iterable[Point]:
        rng = random.Random(self.seed)
        longest = max(self.contexts)
        for _ in range(self.num_mixed):
            decodes = [
                ChunkShape(1, rng.randint(min(self.contexts), longest))
                for _ in range(rng.choice(self.batches))
            ]
            # Sizes even in the logarithm: small chunks are what is left of a budget, and as common as large ones.
            total = round(
                min(self.prefill_counts)
                * (max(self.prefill_counts) / min(self.prefill_counts)) ** rng.random()
            )
            parts = [total] if total < 16 or rng.random() < 0.5 else [total // 3, total - total // 3]
            prompts = [ChunkShape(n, rng.choice(self.pasts), rng.randint(0, 1)) for n in parts]
            yield Point("mixed", (*decodes, *prompts))


def grid_for(device_type: str, quick: bool) -> Grid:
    """For "cpu" a minute or two with a model of 100M parameters; for "cuda" up to what a large pool holds."""
    if device_type == "cpu":
        if quick:
            return Grid((16, 64, 128), (0, 256), (1, 4, 8), (64, 512), 12)
        return Grid((8, 32, 96, 192, 384), (0, 512, 1536), (1, 2, 4, 8, 16, 32), (64, 400, 1200), 32)
    if quick:
        return Grid((64, 512, 2048), (0, 2048), (1, 8, 64), (256, 2048), 16)
    return Grid(
        (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048),
        (0, 1024, 4096, 16384),
        (1, 2, 4, 8, 16, 32, 64, 128, 256),
        (128, 512, 2048, 8192),
        64,
    )
