"""The one contract between a prepared batch and an attention backend."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class PackedLengths:
    """Who attends to what, as one operator takes it: few tensors, of one dimension each and never of size 0 or 1,
    so that torch.compile makes one piece of code for all batches.

    lens:    int32 [4 S + 1]: query_start [S + 1], context_lens [S]; then the context of sequences with one query
        token and 0 for the others, [S]; then the reverse, [S]
    tables:  int32, the block tables, row after row
    header:  int64 on the host: S; entries of a row of `tables`; 1 if the batch is decode steps by construction;
        then S query lengths and S context lengths, or nothing where they will change from one replay of a graph
        to the next
    """

    lens: torch.Tensor
    tables: torch.Tensor
    header: torch.Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Everything that attention over a paged cache needs to know about one flat ("varlen") batch.

    The tokens of S sequences lie one after the other, T in all; sequence i owns the rows
    `query_start[i] : query_start[i + 1]` and they are its *last* tokens: the query in row r of sequence i
    stands at position `context_lens[i] - (query_start[i + 1] - r)` and attends to all positions up to its
    own. So a whole prompt, a chunk of it and a decode token are the same case.

    Shapes and types:
        slot_mapping:  int64 [T], `block_id * block_size + offset` where token t's K and V go
        query_start:   int32 [S + 1]
        context_lens:  int32 [S], tokens in the cache once this step's K and V are stored
        block_tables:  int32 [S, max_blocks], padded with 0; entries past the context are never read

    `query_lens_host` and `context_lens_host` repeat on the host what a backend would have to read back from
    the device; `scratch` keeps what a backend works out once for all layers of the step. Sequences are
    ordered by query length, so decode steps (one token each) come first: `num_decodes` of them.

    `packed` says the same in few tensors, for backends that are compiled or captured in a CUDA graph.
    """

    slot_mapping: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    query_lens_host: tuple[int, ...]
    context_lens_host: tuple[int, ...]
    packed: PackedLengths | None = None
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        """T, the rows of the flat batch."""
        return self.slot_mapping.shape[0]

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.query_lens_host)

    @property
    def num_decodes(self) -> int:
        """Leading sequences with exactly one query token."""
        return self.num_few(1)

    def num_few(self, most: int) -> int:
        """Leading sequences with at most `most` query tokens."""
        return bisect_right(self.query_lens_host, most)


@runtime_checkable
class AttentionBackend(Protocol):
    """Writes K and V into pages and attends over pages.

    `kv_layer` is one layer's view of the block-major cache, `kv_cache[:, layer]`:
    `[num_blocks, 2, kv_heads, block_size, head_dim]`, index 0 of the second dimension is K, 1 is V. It is a
    strided view: a block of all layers is contiguous, a layer is not.
    """

    name: str

    def store(
        self, key: torch.Tensor, value: torch.Tensor, kv_layer: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write `key` and `value` ([T, kv_heads, head_dim]) to the slots of `slot_mapping` (int64 [T])."""
        ...

    def attend(
        self, query: torch.Tensor, kv_layer: torch.Tensor, metadata: AttentionMetadata, scale: float
    ) -> torch.Tensor:
        """Causal attention of `query` ([T, heads, head_dim]) over its sequences' pages; same shape out.

        Query head h reads KV head `h // (heads // kv_heads)`. `scale` multiplies the scores (1/sqrt(head_dim)).
        """
        ...


def store_and_attend(
    backend: AttentionBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    metadata: AttentionMetadata,
    scale: float,
) -> torch.Tensor:
    """One layer's attention: `store`, then `attend`, or both at once where the backend has that."""
    both = getattr(backend, "store_and_attend", None)
    if both is not None and metadata.packed is not None:
        return both(query, key, value, kv_layer, metadata, scale)
    backend.store(key, value, kv_layer, metadata.slot_mapping)
    return backend.attend(query, kv_layer, metadata, scale)
