"""Executes a step plan: one flat batch through the model, logits only where a token is drawn."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from nanopd_lab.attention.base import AttentionBackend, AttentionMetadata
from nanopd_lab.core import Chunk, SampledToken, StepPlan
from nanopd_lab.kv import blocks_for, slots
from nanopd_lab.kv.cache import KVCache
from nanopd_lab.model.paged import PagedBatch
from nanopd_lab.model.sampling import SamplingRow, request_seed, sample


@dataclass(frozen=True)
class Batch:
    """A plan made ready for the device. Chunks are ordered by length, decode tokens first.

    Shapes: input_ids, positions `[1, T]`; logits_index `[R]`, rows of the flat batch whose logits are needed.
    """

    chunks: tuple[Chunk, ...]
    input_ids: torch.Tensor
    positions: torch.Tensor
    logits_index: torch.Tensor
    metadata: AttentionMetadata
    rows: tuple[SamplingRow, ...]


class ModelRunner:
    """Runs plans on one device.

    Args:
        model: causal language model loaded with the attention implementation of `model.paged`
        cache: the KV pool
        backend: how to store and attend
        eos_token_ids: banned while an output is shorter than min_tokens
        seed: for requests without a seed of their own
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        backend: AttentionBackend,
        eos_token_ids: frozenset[int] = frozenset(),
        seed: int = 0,
    ) -> None:
        self.model = model
        self.cache = cache
        self.backend = backend
        self.eos_token_ids = eos_token_ids
        self.seed = seed
        self.device = cache.tensor.device

    def execute(self, plan: StepPlan) -> list[list[SampledToken]]:
        """Run the plan; element i holds the `samples` tokens drawn behind `plan.chunks[i]`."""
        self.cache.copy_blocks(plan.copies)
        batch = self.prepare(plan.chunks)
        logits = self.logits(batch)
        drawn = iter(sample(logits, batch.rows) if batch.rows else [])
        by_chunk = {id(chunk): [next(drawn) for _ in range(chunk.samples)] for chunk in batch.chunks}
        return [by_chunk[id(chunk)] for chunk in plan.chunks]

    @torch.inference_mode()
    def logits(self, batch: Batch) -> torch.Tensor:
        """`[R, vocab]`, one row for each entry of `batch.logits_index`; stores the batch's K and V."""
        paged = PagedBatch(batch.metadata, self.cache, self.backend)
        if not len(batch.logits_index):  # only middles of prompts: no need for the vocabulary projection
            self.model.base_model(
                input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False, paged=paged
            )
            return torch.empty(0, self.model.config.vocab_size, device=self.device)
        out = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=batch.logits_index,
            paged=paged,
        )
        return out.logits[0]

    def prepare(self, chunks: Seq[Chunk]) -> Batch:
        """Flatten chunks into one batch on the device."""
        ordered = sorted(chunks, key=lambda chunk: chunk.count)
        size = self.cache.shape.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        query_start = [0]
        logits_index: list[int] = []
        rows: list[SamplingRow] = []
        for chunk in ordered:
            sequence = chunk.sequence
            tokens.extend(sequence.tokens[chunk.start : chunk.end])
            positions.extend(range(chunk.start, chunk.end))
            slot_mapping.extend(slots(sequence.blocks, chunk.start, chunk.count, size))
            query_start.append(len(tokens))
            if chunk.samples:
                rows.extend(self._rows(chunk, len(logits_index)))
                logits_index.append(len(tokens) - 1)
        width = max(blocks_for(chunk.end, size) for chunk in ordered)
        tables = [
            chunk.sequence.blocks[:width] + [0] * (width - len(chunk.sequence.blocks)) for chunk in ordered
        ]
        contexts = tuple(chunk.end for chunk in ordered)

        def tensor(values: object, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

        return Batch(
            chunks=tuple(ordered),
            input_ids=tensor([tokens]),
            positions=tensor([positions]),
            logits_index=tensor(logits_index),
            metadata=AttentionMetadata(
                slot_mapping=tensor(slot_mapping),
                query_start=tensor(query_start, torch.int32),
                context_lens=tensor(contexts, torch.int32),
                block_tables=tensor(tables, torch.int32),
                query_lens_host=tuple(chunk.count for chunk in ordered),
                context_lens_host=contexts,
            ),
            rows=tuple(rows),
        )

    def _rows(self, chunk: Chunk, logits_row: int) -> list[SamplingRow]:
        sequence = chunk.sequence
        params, position = sequence.request.params, sequence.output_len
        seed = params.seed if params.seed is not None else request_seed(self.seed, sequence.request.serial)
        banned: tuple[int, ...] = ()
        if position + 1 < params.min_tokens:
            ends = frozenset() if params.ignore_eos else self.eos_token_ids
            banned = tuple(ends.union(params.stop_token_ids or ()))
        first = sequence.index
        return [
            SamplingRow(params, logits_row, seed, first + offset, position, banned)
            for offset in range(chunk.samples)
        ]
