"""Steps captured as CUDA graphs: a step is then one replay, whatever its number of kernels.

A graph replays the same kernels on the same addresses, so it is captured for a capacity and fed through one
packed buffer (`model.batch`); a step takes the smallest graph it fits in, and what is over is padding. The
kernels read on the device who decodes, who prefills and how long everybody is. Three kinds:

    decode   one token a sequence, by number of sequences; the vocabulary projection included
    whole    chunks and decode steps together, by number of tokens; logits behind the graph, only where needed
    pieces   the same: one graph from each layer's attention to the next one's, and the attention itself launched
             between them, since the best kernel for a long chunk depends on its lengths. Launching takes its time:
             for steps that compute for longer

All graphs share one memory pool: they never run at the same time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from nanopd_lab.attention.cuda import LONG_QUERY, attend_known, cutting
from nanopd_lab.core import Chunk, Request, SamplingParams, Sequence
from nanopd_lab.model.batch import Layout, PackedBatch, metadata_of, pack, select

if TYPE_CHECKING:
    from nanopd_lab.model.runner import ModelRunner

DECODE_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MIXED_SIZES = (64, 128, 256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1536, 1792, 2048)
ALWAYS_WHOLE = 512  # tokens
# On an H100 launching a layer's pieces takes 0.27 ms. As long take so many multiplications of weights, and the detour
# of long chunks and decodes through one paged kernel, for so many pairs of a query (of all heads) and a key. A
# decode's query fills one row of the kernel's tiles.
LAUNCH_PRODUCTS = 1e11
LAUNCH_PAIRS = 6e7
TILE_ROWS = 16


def sizes_up_to(sizes: Iterable[int], largest: int) -> list[int]:
    """Those below `largest`, and `largest` itself."""
    return [*(size for size in sizes if size < largest), largest]


def _detour_pairs(chunk: Chunk) -> float:
    """Pairs that a kernel of their own would compute faster than the one that takes all chunks."""
    if chunk.count == 1:
        return TILE_ROWS * chunk.end
    return chunk.count * (chunk.start + chunk.count / 2) if chunk.count >= LONG_QUERY else 0


class Replay(Protocol):
    """What has been captured of a step."""

    def __call__(self, batch: PackedBatch) -> None:
        """Run it on the batch that lies in the buffers."""


@dataclass(frozen=True)
class WholeStep:
    """One graph, attention included; the device knows all that it needs."""

    graph: torch.cuda.CUDAGraph

    def __call__(self, batch: PackedBatch) -> None:
        self.graph.replay()


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention between two pieces. The tensors are the pool's memory, which they do not own: it is
    used for other things too, before and after."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    kv_layer: torch.Tensor
    workspace: torch.Tensor
    scale: float

    def __call__(self, batch: PackedBatch, fields: dict[str, torch.Tensor], tables: torch.Tensor) -> None:
        tokens, sequences = batch.num_tokens, len(batch.lengths)
        query, key, value = self.query[:tokens], self.key[:tokens], self.value[:tokens]
        torch.ops.nanopd.kv_store(key, value, self.kv_layer, fields["slot_mapping"][:tokens])
        attend_known(
            query,
            self.kv_layer,
            fields["query_start"][: sequences + 1],
            fields["context_lens"][:sequences],
            tables[:sequences],
            self.workspace,
            batch.lengths,
            batch.contexts,
            self.scale,
            fresh=(key, value),
            out=self.out,
        )


@dataclass(frozen=True)
class StepInPieces:
    """Graphs with each layer's attention between them; `fields` with the slots as int64."""

    graphs: list[torch.cuda.CUDAGraph]
    calls: list[AttentionCall]
    fields: dict[str, torch.Tensor]
    tables: torch.Tensor

    def __call__(self, batch: PackedBatch) -> None:
        self.graphs[0].replay()
        for call, graph in zip(self.calls, self.graphs[1:], strict=True):
            call(batch, self.fields, self.tables)
            graph.replay()


@dataclass(frozen=True)
class CapturedStep:
    """One captured step and its buffers."""

    layout: Layout
    replay: Replay
    packed: torch.Tensor
    tables: torch.Tensor
    output: torch.Tensor
    head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None

    def run(self, batch: PackedBatch, wanted: list[int]) -> torch.Tensor:
        """`[R, vocab]` logits of the sequences `wanted`."""
        self.packed[: len(batch.packed)].copy_(batch.packed, non_blocking=True)
        rows = len(batch.chunks)
        given = self.packed[self.layout.size : len(batch.packed)].view(rows, batch.width)
        self.tables[:rows, : batch.width].copy_(given)
        self.replay(batch)
        if self.head is None:
            return self.output[:rows]
        index = self.layout.views(self.packed)["logits_index"][:rows]
        return self.head(self.output, select(index, wanted))


def borrow(tensor: torch.Tensor) -> torch.Tensor:
    """A second tensor over the same GPU memory that does not keep it from being re-used."""

    class Interface:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
            "typestr": f"<i{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }

    return torch.as_tensor(Interface(), device=tensor.device).view(tensor.dtype)


class GraphSet:
    """The captured steps of one runner, whose pool and backend must be in place.

    Args:
        runner: whose model to capture
        max_blocks: longest block table
        max_num_seqs: sequences that a step may hold
        max_num_batched_tokens: tokens that any step may hold, also one without a graph
        largest: tokens of the largest graph
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        max_blocks: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        largest: int,
    ) -> None:
        self.runner = runner
        self.max_num_seqs = max_num_seqs
        self._num_heads = int(runner.model.config.num_attention_heads)
        rows = max(max_num_seqs, largest)
        size = Layout(largest, rows).size + rows * max_blocks
        self._packed = torch.zeros(size, dtype=torch.int32, device=runner.device)
        self._tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=runner.device)
        runner.last_tokens = torch.zeros(
            max(rows, max_num_batched_tokens), dtype=torch.int64, device=runner.device
        )
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(runner.device)
        self.decode: list[CapturedStep] = []
        self.whole: list[CapturedStep] = []
        self.pieces: list[CapturedStep] = []

    def capture_mixed(self, sizes: Iterable[int], layer_weights: int) -> None:
        """Capture steps of chunks and decodes, by tokens: in pieces, and whole where launching pieces would take longer
        than computing them, which depends on the weights of a layer.

        The largest first: the others re-use its memory.
        """
        for size in sorted(sizes, reverse=True):
            layout = Layout(size, min(size, self.max_num_seqs))
            if size > ALWAYS_WHOLE:
                self.pieces.insert(0, self._capture_pieces(layout))
            if size <= ALWAYS_WHOLE or size * layer_weights <= LAUNCH_PRODUCTS:
                self.whole.insert(0, self._capture(layout, decode_only=False))

    def capture_decode(self, sizes: Iterable[int]) -> None:
        """Capture decode steps, by sequences."""
        for size in sorted(sizes, reverse=True):
            self.decode.insert(0, self._capture(Layout(size, size), decode_only=True))

    def find(self, chunks: Seq[Chunk]) -> CapturedStep | None:
        """The smallest graph that holds these chunks, ordered as `batch.order` does; None if none does."""
        counts = [chunk.count for chunk in chunks]
        tokens, sequences = sum(counts), len(counts)
        if counts[-1] == 1 and self.decode and sequences <= self.decode[-1].layout.sequences:
            return self.decode[bisect_left(self.decode, sequences, key=lambda step: step.layout.sequences)]
        kinds = (self.whole, self.pieces)
        if tokens > ALWAYS_WHOLE and self._num_heads * sum(map(_detour_pairs, chunks)) > LAUNCH_PAIRS:
            kinds = (self.pieces, self.whole)
        for steps in kinds:
            for step in steps[bisect_left(steps, tokens, key=lambda step: step.layout.tokens) :]:
                if step.layout.sequences >= sequences:
                    return step
        return None

    def _capture(self, layout: Layout, decode_only: bool) -> CapturedStep:
        runner = self.runner
        fields = layout.views(self._packed)
        tables = self._tables[: layout.sequences]
        lens = layout.lens(self._packed)
        self._fill(layout, decode_only)

        def step() -> torch.Tensor:
            metadata = metadata_of(fields, lens, tables, decode_only=decode_only)
            hidden = runner.hidden(fields, metadata)
            return runner.head(hidden, fields["logits_index"]) if decode_only else hidden

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.inference_mode():
            for _ in range(2):  # compiles what is compiled on first use, and fills the caches
                step()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = step()
        torch.cuda.current_stream().wait_stream(self._stream)
        head = None if decode_only else runner.head
        return CapturedStep(layout, WholeStep(graph), self._packed, self._tables, output, head)

    def _capture_pieces(self, layout: Layout) -> CapturedStep:
        runner = self.runner
        fields = layout.views(self._packed)
        tables = self._tables[: layout.sequences]
        self._fill(layout, decode_only=False)
        graphs: list[torch.cuda.CUDAGraph] = []
        calls: list[AttentionCall] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            graphs[-1].capture_begin(pool=self._pool)

        def cut(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            kv_layer: torch.Tensor,
            workspace: torch.Tensor,
            scale: float,
        ) -> torch.Tensor:
            out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
            graphs[-1].capture_end()
            lent = (borrow(query), borrow(key), borrow(value), borrow(out))
            calls.append(AttentionCall(*lent, kv_layer, workspace, scale))
            begin()
            return out

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.inference_mode():
            metadata = metadata_of(fields, layout.lens(self._packed), tables)
            runner.hidden(fields, metadata)
            torch.cuda.synchronize()
            begin()
            # Captured too, so that the slots of every replay are widened.
            metadata = metadata_of(fields, layout.lens(self._packed), tables)
            slots = metadata.slot_mapping
            with cutting(cut):
                output = runner.hidden(fields, metadata)
            graphs[-1].capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        replay = StepInPieces(graphs, calls, {**fields, "slot_mapping": slots}, self._tables)
        return CapturedStep(layout, replay, self._packed, self._tables, output, runner.head)

    def _fill(self, layout: Layout, decode_only: bool) -> None:
        """A plausible batch for the warm-up: every sequence in block 0, which nobody uses yet."""
        size = self.runner.cache.shape.block_size
        count = 1 if decode_only else min(size, layout.tokens // layout.sequences)
        sequence = Sequence(Request("warm-up", [0] * size, SamplingParams()), blocks=[0])
        chunks = tuple(Chunk(sequence, 0, count, 0) for _ in range(layout.sequences))
        batch = pack(chunks, layout, size, {}, pinned=False)
        self._packed[: len(batch.packed)].copy_(batch.packed)
        self._tables.zero_()
