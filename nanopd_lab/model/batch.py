"""One step's integers, packed: everything the model must be told beside weights and pages.

All of it goes to the device in one copy. A CUDA graph wants its inputs at fixed places, so a layout is made for
a *capacity* (tokens, sequences), which is the batch's own size in an eager step and the graph's in a captured
one; places behind the batch's end hold padding: token 0 at position 0, slot -1 (not stored), context 0 (attends
to nothing).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter

import numpy as np
import torch

from nanopd_lab.attention.base import AttentionMetadata, PackedLengths
from nanopd_lab.core import PENDING, BlockTable, Chunk
from nanopd_lab.kv import blocks_for


@dataclass(frozen=True)
class Layout:
    """Where each field lies in the packed int32 vector. Block tables come last: their width varies."""

    tokens: int
    sequences: int

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """name -> (first element, length)."""
        return _fields(self.tokens, self.sequences)

    @property
    def size(self) -> int:
        """Elements of all fields, block tables apart."""
        first, length = self.fields["logits_index"]
        return first + length

    def lens(self, packed: torch.Tensor) -> torch.Tensor:
        """The four fields about lengths in one piece, see `PackedLengths`."""
        first = self.fields["query_start"][0]
        return packed[first : first + 4 * self.sequences + 1]

    def views(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each field as a view of the packed vector."""
        return {name: packed[first : first + length] for name, (first, length) in self.fields.items()}


@lru_cache(maxsize=4096)
def _fields(tokens: int, sequences: int) -> dict[str, tuple[int, int]]:
    lengths = {
        "input_ids": tokens,
        "source": tokens,  # where the token is PENDING: its place among the tokens drawn last; else -1
        "positions": tokens,
        "slot_mapping": tokens,
        "query_start": sequences + 1,
        "context_lens": sequences,
        "decode_lens": sequences,
        "prefill_lens": sequences,
        "logits_index": sequences,  # the row of each sequence's last token
    }
    fields, first = {}, 0
    for name, length in lengths.items():
        fields[name] = (first, length)
        first += length
    return fields


@dataclass(frozen=True)
class PackedBatch:
    """A plan's chunks on the host, ordered by length: decode steps come first.

    packed: int32, the layout's fields and then `[sequences, width]` block tables
    counts, ends: `[sequences]`, each chunk's tokens, and its context with them
    """

    chunks: tuple[Chunk, ...]
    layout: Layout
    packed: torch.Tensor
    width: int
    counts: np.ndarray
    ends: np.ndarray

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the batch, padding apart."""
        return int(self.counts.sum())

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """`counts` for those who want integers."""
        return tuple(self.counts.tolist())

    @cached_property
    def contexts(self) -> tuple[int, ...]:
        """`ends` for those who want integers."""
        return tuple(self.ends.tolist())


class TableMemory:
    """Which sequence's block table lies in which row of the latest batch, so that the next one can take it over.

    A table is a list that only grows, except that a chunk may replace (copy-on-write) the blocks that it writes. A
    sequence that gives up its blocks starts a new list.
    """

    def __init__(self) -> None:
        self._tables = np.zeros((0, 0), np.int32)
        self._lists: list[BlockTable] = []  # kept, so that no other list gets the id of one of them
        self._ids: list[int] = []

    def fill(
        self, tables: np.ndarray, chunks: Seq[Chunk], starts: np.ndarray, singles: int, size: int
    ) -> None:
        """Write the chunks' block tables to the rows of `tables`; the first `singles` chunks are of one token."""
        lists = [chunk.sequence.blocks for chunk in chunks]
        ids = list(map(id, lists))
        before = np.arange(singles)
        if ids[:singles] != self._ids[:singles]:
            rows = {number: row for row, number in enumerate(self._ids)}
            before = np.array([rows.get(number, -1) for number in ids[:singles]], np.int64)
        shared = min(tables.shape[1], self._tables.shape[1])
        tables[:singles, :shared] = self._tables[before, :shared] if shared else 0
        tables[:singles, shared:] = 0
        for row in [*np.flatnonzero(before < 0).tolist(), *range(singles, len(chunks))]:
            known = lists[row][: tables.shape[1]]
            tables[row, : len(known)] = known
            tables[row, len(known) :] = 0
        # The one block that a single token is written to is all that may be new.
        places = starts[:singles] // size
        tables[np.arange(singles), places] = [
            blocks[place] for blocks, place in zip(lists, places.tolist(), strict=False)
        ]
        self._tables, self._lists, self._ids = tables, lists, ids


def to_device(values: Seq[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of host numbers; pinned where that lets the copy run behind the host's back."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def select(rows: torch.Tensor, wanted: Seq[int]) -> torch.Tensor:
    """`rows[wanted]`, ascending places; all of them as they are, without a copy."""
    return rows if len(wanted) == len(rows) else rows[to_device(wanted, torch.int64, rows.device)]


def order(chunks: Seq[Chunk]) -> tuple[Chunk, ...]:
    """By length, decode steps first; stable, so equal ones stay in the plan's order."""
    return tuple(sorted(chunks, key=attrgetter("count")))


def pack(
    chunks: tuple[Chunk, ...],
    layout: Layout,
    block_size: int,
    sources: dict[int, int],
    pinned: bool,
    memory: TableMemory | None = None,
) -> PackedBatch:
    """Flatten ordered chunks into the layout.

    Args:
        sources: by id(sequence), where the step before put the token it draws for that sequence
        pinned: in page-locked memory, so that the copy to a GPU runs behind the host's back
        memory: of the batch before
    """
    used = len(chunks)
    starts = np.array([chunk.start for chunk in chunks])
    counts = np.array([chunk.count for chunk in chunks])
    ends = starts + counts
    width = max(2, blocks_for(int(ends.max()), block_size))
    packed = torch.empty(layout.size + used * width, dtype=torch.int32, pin_memory=pinned)
    flat = packed.numpy()
    view = {name: flat[first : first + length] for name, (first, length) in layout.fields.items()}
    tables = flat[layout.size :].reshape(used, width)
    singles = int(counts.searchsorted(1, side="right"))
    (memory or TableMemory()).fill(tables, chunks, starts, singles, block_size)

    query_start = np.concatenate([[0], counts.cumsum()])
    total = int(query_start[-1])
    tokens = [chunk.sequence.tokens[chunk.start] for chunk in chunks[:singles]]
    for chunk in chunks[singles:]:
        tokens += chunk.sequence.tokens[chunk.start : chunk.end]
    rows = np.repeat(np.arange(used), counts)
    positions = np.arange(total) + (starts - query_start[:-1])[rows]
    blocks = tables[rows, positions // block_size].astype(np.int64)
    for name, values, padding in (
        ("input_ids", tokens, 0),
        ("positions", positions, 0),
        ("slot_mapping", blocks * block_size + positions % block_size, -1),
        ("query_start", query_start, total),
        ("context_lens", ends, 0),
        ("decode_lens", np.where(counts == 1, ends, 0), 0),
        ("prefill_lens", np.where(counts == 1, 0, ends), 0),
        ("logits_index", query_start[1:] - 1, 0),
    ):
        view[name][: len(values)] = values
        view[name][len(values) :] = padding
    view["source"][:] = -1
    # Only the token of a decode step may be unknown, so its place is its sequence's.
    pending = np.flatnonzero(view["input_ids"][:singles] == PENDING)
    view["input_ids"][pending] = 0
    view["source"][pending] = [sources[id(chunks[row].sequence)] for row in pending.tolist()]
    return PackedBatch(chunks, layout, packed, width, counts, ends)


def metadata_of(
    fields: dict[str, torch.Tensor],
    lens: torch.Tensor,
    tables: torch.Tensor,
    batch: PackedBatch | None = None,
    decode_only: bool = False,
) -> AttentionMetadata:
    """The attention contract over a packed batch on the device.

    Args:
        lens: the fields from query_start to prefill_lens in one piece
        tables: `[S, width]`, contiguous
        batch: gives the lengths on the host; None in a graph, where they change from replay to replay
        decode_only: the graph is for decode steps alone
    """
    known = (*batch.lengths, *batch.contexts) if batch else ()
    header = torch.tensor([*tables.shape, int(decode_only), *known])
    return AttentionMetadata(
        slot_mapping=fields["slot_mapping"].long(),
        query_start=fields["query_start"],
        context_lens=fields["context_lens"],
        block_tables=tables,
        query_lens_host=batch.lengths if batch else (),
        context_lens_host=batch.contexts if batch else (),
        packed=PackedLengths(lens, tables.view(-1), header),
    )


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one meanwhile: streams, events and graphs that name none are then its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
