"""Executes step plans: one flat batch through the model, logits only where a token is drawn.

`launch` hands a plan to the device and returns at once; `Launched.result` waits for its tokens. The next plan may
be launched before: where it goes on with a token that this one draws, it takes it from the device.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from nanopd_lab.attention.base import AttentionBackend, AttentionMetadata
from nanopd_lab.core import Chunk, SampledToken, Sequence, StepPlan
from nanopd_lab.kv.cache import KVCache
from nanopd_lab.model.batch import Layout, TableMemory, metadata_of, on_device, order, pack, select
from nanopd_lab.model.graphs import GraphSet
from nanopd_lab.model.paged import PagedBatch, bind_cache
from nanopd_lab.model.sampling import Drawn, Recipe, SamplingRow, draw, request_seed


@dataclass(frozen=True)
class _Draws:
    """Whose tokens a step draws, and how: the same for as long as the same sequences go on.

    sequences: in the order of the logits' rows
    goes_on: rows of those that draw one token; their tokens may be the next step's input
    sources: by id(sequence): its place among those
    """

    sequences: Seq[Sequence] = ()
    recipe: Recipe | None = None
    goes_on: Seq[int] = ()
    sources: dict[int, int] = field(default_factory=dict)

    @property
    def lasting(self) -> bool:
        """True if the step after, of the same sequences, draws in the same way but for positions."""
        return (
            self.recipe is not None and not self.recipe.banned and len(self.goes_on) == len(self.recipe.rows)
        )


@dataclass(frozen=True)
class Launched:
    """A plan that the device is working on."""

    plan: StepPlan
    chunks: tuple[Chunk, ...]
    drawn: Drawn | None
    computed: torch.cuda.Event | None = None  # where another worker is going to read what the step wrote

    def result(self) -> Seq[Seq[SampledToken]]:
        """Element i holds the `samples` tokens drawn behind `plan.chunks[i]`. Waits for the device."""
        if self.computed is not None:
            self.computed.synchronize()
        drawn = self.drawn.result() if self.drawn else []
        if self.chunks == self.plan.chunks and all(chunk.samples == 1 for chunk in self.chunks):
            return list(zip(drawn))
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
        self._tables = TableMemory()
        self._draws = _Draws()
        bind_cache(self.model, cache)

    def execute(self, plan: StepPlan) -> Seq[Seq[SampledToken]]:
        """Run the plan and wait for it: `launch(plan).result()`."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Put the plan on the device's queue."""
        with on_device(self.device):
            self.cache.copy_blocks(plan.copies)
            chunks = order(plan.chunks)
            logits = self.logits(chunks)
            draws = self._prepare([chunk for chunk in chunks if chunk.samples], logits.shape[1])
            drawn = draw(logits, draws.recipe) if draws.recipe else None
            self._draws = draws  # not before: a launch that fails must leave what the step before has drawn
            if drawn and draws.goes_on:
                self._remember(drawn.tokens)
            computed = None
            if self.device.type == "cuda" and any(chunk.sequence.hand_off for chunk in chunks):
                computed = torch.cuda.Event()
                computed.record()
            return Launched(plan, chunks, drawn, computed)

    def logits(self, chunks: tuple[Chunk, ...]) -> torch.Tensor:
        """`[R, vocab]`, a row for each chunk that ends in a sample; stores the batch's K and V."""
        tokens, lengths = sum(chunk.count for chunk in chunks), len(chunks)
        graph = self.graphs.find(chunks) if self.graphs else None
        layout = graph.layout if graph else Layout(tokens, lengths)
        size = self.cache.shape.block_size
        pinned = self.device.type == "cuda"
        batch = pack(chunks, layout, size, self._draws.sources, pinned, self._tables)
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

    def _remember(self, tokens: torch.Tensor) -> None:
        """Keep on the device what was drawn for sequences that go on: the next step's input."""
        # Of logits that were not finite too: that sequence ends, and what is computed of it meanwhile is dropped.
        tokens = select(tokens, self._draws.goes_on)
        if self.graphs:
            self.last_tokens[: len(tokens)].copy_(tokens)
        else:
            self.last_tokens = tokens

    def _prepare(self, chunks: list[Chunk], vocab: int) -> _Draws:
        """What to draw behind these chunks: as in the step before, if they are of the same sequences."""
        sequences = [chunk.sequence for chunk in chunks]
        known = self._draws
        if known.recipe is not None and known.lasting and sequences == known.sequences:
            if known.recipe.num_drawn:
                known.recipe.move([chunk.start + chunk.count - chunk.sequence.prompt_len for chunk in chunks])
            return known
        rows: list[SamplingRow] = []
        goes_on: list[int] = []
        sources: dict[int, int] = {}
        for number, chunk in enumerate(chunks):
            if chunk.samples == 1:
                sources[id(chunk.sequence)] = len(goes_on)
                goes_on.append(len(rows))
            rows.extend(self._rows(chunk, number))
        recipe = Recipe(rows, vocab, self.device) if rows else None
        return _Draws(sequences, recipe, goes_on, sources)

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
