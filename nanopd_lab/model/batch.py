"""One step's integers, packed: everything the model must be told beside weights and pages.

All of it goes to the device in one copy. A CUDA graph wants its inputs at fixed places, so a layout is made for
a *capacity* (tokens, sequences), which is the batch's own size in an eager step and the graph's in a captured
one; places behind the batch's end hold padding: token 0 at position 0, slot -1 (not stored), context 0 (attends
to nothing).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from nanopd_lab.attention.base import AttentionMetadata, PackedLengths
from nanopd_lab.core import PENDING, Chunk
from nanopd_lab.kv import slots


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
    logits_rows: rows of the flat batch whose logits are needed
    """

    chunks: tuple[Chunk, ...]
    layout: Layout
    packed: torch.Tensor
    width: int
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch, padding apart."""
        return sum(self.lengths)


def to_device(values: Seq[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of host numbers; pinned where that lets the copy run behind the host's back."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def select(rows: torch.Tensor, wanted: Seq[int]) -> torch.Tensor:
    """`rows[wanted]`, ascending places; all of them as they are, without a copy."""
    return rows if len(wanted) == len(rows) else rows[to_device(wanted, torch.int64, rows.device)]


def order(chunks: Seq[Chunk]) -> tuple[Chunk, ...]:
    """By length, decode steps first; stable, so equal ones stay in the plan's order."""
    return tuple(sorted(chunks, key=lambda chunk: chunk.count))


def pack(
    chunks: tuple[Chunk, ...], layout: Layout, block_size: int, sources: dict[int, int], pinned: bool
) -> PackedBatch:
    """Flatten ordered chunks into the layout.

    Args:
        sources: by id(sequence), where the step before put the token it draws for that sequence
        pinned: in page-locked memory, so that the copy to a GPU runs behind the host's back
    """
    width = max(2, *(len(chunk.sequence.blocks) for chunk in chunks))
    size = layout.size + len(chunks) * width
    packed = torch.empty(size, dtype=torch.int32, pin_memory=pinned)
    flat = packed.numpy()
    view = {name: flat[first : first + length] for name, (first, length) in layout.fields.items()}
    tables = flat[layout.size :].reshape(len(chunks), width)
    tables[:] = 0

    tokens: list[int] = []
    positions: list[int] = []
    mapping: list[int] = []
    pending: list[tuple[int, int]] = []
    starts = [0]
    for row, chunk in enumerate(chunks):
        sequence, start, count = chunk.sequence, chunk.start, chunk.count
        blocks = sequence.blocks
        if count == 1:
            token = sequence.tokens[start]
            if token == PENDING:
                pending.append((len(tokens), sources[id(sequence)]))
            tokens.append(token)
            positions.append(start)
            mapping.append(blocks[start // block_size] * block_size + start % block_size)
        else:
            tokens.extend(sequence.tokens[start : start + count])
            positions.extend(range(start, start + count))
            mapping.extend(slots(blocks, start, count, block_size))
        starts.append(len(tokens))
        tables[row, : len(blocks)] = blocks

    total, used = len(tokens), len(chunks)
    for name, values, padding in (
        ("input_ids", tokens, 0),
        ("positions", positions, 0),
        ("slot_mapping", mapping, -1),
    ):
        view[name][:total] = values
        view[name][total:] = padding
    view["source"][:] = -1
    for place, source in pending:
        view["input_ids"][place] = 0
        view["source"][place] = source
    view["query_start"][: used + 1] = starts
    view["query_start"][used + 1 :] = total
    lengths = np.diff(view["query_start"][: used + 1])
    contexts = np.fromiter((chunk.start for chunk in chunks), np.int32, used) + lengths
    for name, lens in (
        ("context_lens", contexts),
        ("decode_lens", np.where(lengths == 1, contexts, 0)),
        ("prefill_lens", np.where(lengths == 1, 0, contexts)),
        ("logits_index", view["query_start"][1 : used + 1] - 1),
    ):
        view[name][:used] = lens
        view[name][used:] = 0
    return PackedBatch(chunks, layout, packed, width, tuple(lengths.tolist()), tuple(contexts.tolist()))


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
