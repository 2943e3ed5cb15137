"""Executes step plans: one flat batch through the model, logits only where a token is drawn.

`launch` hands a plan to the device and returns at once; `Launched.result` waits for its tokens. The next plan may
be launched before: where it goes on with a token that this one draws, it takes it from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from nanopd_lab.attention.base import AttentionBackend, AttentionMetadata
from nanopd_lab.core import Chunk, SampledToken, StepPlan
from nanopd_lab.kv.cache import KVCache
from nanopd_lab.model.batch import Layout, metadata_of, order, pack, select
from nanopd_lab.model.graphs import GraphSet
from nanopd_lab.model.paged import PagedBatch, bind_cache
from nanopd_lab.model.sampling import Drawn, SamplingRow, draw, request_seed


@dataclass(frozen=True)
class Launched:
    """A plan that the device is working on."""

    plan: StepPlan
    chunks: tuple[Chunk, ...]
    drawn: Drawn | None
    computed: torch.cuda.Event | None = None  # where another worker is going to read what the step wrote

    def result(self) -> list[list[SampledToken]]:
        """Element i holds the `samples` tokens drawn behind `plan.chunks[i]`. Waits for the device."""
        if self.computed is not None:
            self.computed.synchronize()
        drawn = self.drawn.result() if self.drawn else []
        if self.chunks == self.plan.chunks and all(chunk.samples == 1 for chunk in self.chunks):
            return [[token] for token in drawn]
        tokens = iter(drawn)
        by_chunk = {id(chunk): [next(tokens) for _ in range(chunk.samples)] for chunk in self.chunks}
        return [by_chunk[id(chunk)] for chunk in self.plan.chunks]


class ModelRunner:
    """Runs plans on one device, in the order in which they are launched.

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
        self.backend = backend
        self.eos_token_ids = eos_token_ids
        self.seed = seed
        self.graphs: GraphSet | None = None
        self.use_cache(cache)

    def use_cache(self, cache: KVCache) -> None:
        """Work on this pool from now on."""
        self.cache = cache
        self.device = cache.tensor.device
        self.last_tokens = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._sources: dict[int, int] = {}  # by id(sequence): its place in `last_tokens`
        bind_cache(self.model, cache)

    def execute(self, plan: StepPlan) -> list[list[SampledToken]]:
        """Run the plan and wait for it: `launch(plan).result()`."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Put the plan on the device's queue."""
        self.cache.copy_blocks(plan.copies)
        chunks = order(plan.chunks)
        logits = self.logits(chunks)
        rows: list[SamplingRow] = []
        logits_row = 0
        for chunk in chunks:
            if chunk.samples:
                rows.extend(self._rows(chunk, logits_row))
                logits_row += 1
        drawn = draw(logits, rows) if rows else None
        self._remember(chunks, drawn)
        computed = None
        if self.device.type == "cuda" and any(chunk.sequence.hand_off for chunk in chunks):
            computed = torch.cuda.Event()
            computed.record()
        return Launched(plan, chunks, drawn, computed)

    def logits(self, chunks: tuple[Chunk, ...]) -> torch.Tensor:
        """`[R, vocab]`, a row for each chunk that ends in a sample; stores the batch's K and V."""
        tokens, lengths = sum(chunk.count for chunk in chunks), len(chunks)
        graph = self.graphs.find(tokens, lengths, decode_only=chunks[-1].count == 1) if self.graphs else None
        layout = graph.layout if graph else Layout(tokens, lengths)
        size = self.cache.shape.block_size
        batch = pack(chunks, layout, size, self._sources, pinned=self.device.type == "cuda")
        wanted = [row for row, chunk in enumerate(chunks) if chunk.samples]
        if graph:
            return graph.run(batch, wanted)
        packed = batch.packed.to(self.device, non_blocking=True)
        fields = layout.views(packed)
        tables = packed[layout.size :].view(lengths, batch.width)
        metadata = metadata_of(fields, layout.lens(packed), tables, batch)
        hidden = self.hidden(fields, metadata)
        return self.head(hidden, select(fields["logits_index"], wanted))

    def hidden(self, fields: dict[str, torch.Tensor], metadata: AttentionMetadata) -> torch.Tensor:
        """`[T, hidden_size]`, the last hidden states of a packed batch on the device."""
        bind_cache(self.model, self.cache)
        drawn = self.last_tokens[fields["source"].clamp(min=0)]
        ids = torch.where(fields["source"] >= 0, drawn, fields["input_ids"])
        out = self.model.base_model(
            input_ids=ids[None],
            position_ids=fields["positions"][None].long(),
            use_cache=False,
            paged=PagedBatch(metadata, self.backend),
        )
        return out.last_hidden_state[0]

    def head(self, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """`[R, vocab]` of rows `index` of the hidden states."""
        if not len(index):  # only middles of prompts: no need for the vocabulary projection
            return torch.empty(0, self.model.config.vocab_size, device=self.device)
        return self.model.get_output_embeddings()(hidden.index_select(0, index))

    def _remember(self, chunks: tuple[Chunk, ...], drawn: Drawn | None) -> None:
        """Keep on the device what was drawn for sequences that go on: the next step's input."""
        self._sources = {}
        if drawn is None:
            return
        singles: list[int] = []
        row = 0
        for chunk in chunks:
            if chunk.samples == 1:
                self._sources[id(chunk.sequence)] = len(singles)
                singles.append(row)
            row += chunk.samples
        tokens = select(drawn.tokens, singles)
        # A row that was not finite drew -1; its sequence ends, and what goes on meanwhile is dropped.
        tokens = tokens.clamp(min=0)
        if self.graphs:
            self.last_tokens[: len(singles)].copy_(tokens)
        else:
            self.last_tokens = tokens if singles else self.last_tokens

    def _rows(self, chunk: Chunk, logits_row: int) -> list[SamplingRow]:
        sequence = chunk.sequence
        params, position = sequence.request.params, chunk.start + chunk.count - sequence.prompt_len
        if chunk.samples == 1 and params.greedy and position + 1 >= params.min_tokens:
            return [SamplingRow(params, logits_row, 0, sequence.index, position)]
        seed = params.seed
        if seed is None:
            seed = 0 if params.greedy else request_seed(self.seed, sequence.request.serial)
        banned: tuple[int, ...] = ()
        if position + 1 < params.min_tokens:
            ends = frozenset() if params.ignore_eos else self.eos_token_ids
            banned = tuple(ends.union(params.stop_token_ids or ()))
        first = sequence.index
        return [
            SamplingRow(params, logits_row, seed, first + offset, position, banned)
            for offset in range(chunk.samples)
        ]
