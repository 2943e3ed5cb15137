"""The packed batch: what lies where, and what padding looks like."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopd_lab.core import PENDING, Chunk, Request, SamplingParams, Sequence
from nanopd_lab.kv import blocks_for, slots
from nanopd_lab.model.batch import Layout, TableMemory, order, pack

SIZE = 4


def make(shapes: list[tuple[int, int, bool]]) -> tuple[Chunk, ...]:
    """Chunks of (count, past); a pending one has a single token that is not known yet."""
    chunks, used = [], 0
    for number, (count, past, pending) in enumerate(shapes):
        end = past + count
        tokens = [100 * number + position for position in range(end)]
        if pending and count == 1:
            tokens[-1] = PENDING
        blocks = list(range(used, used + blocks_for(end, SIZE)))
        used += len(blocks)
        sequence = Sequence(Request(str(number), tokens, SamplingParams()), tokens=tokens, blocks=blocks)
        chunks.append(Chunk(sequence, past, count, 1))
    return order(chunks)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20), st.booleans()), min_size=1, max_size=8),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_every_field_is_where_the_layout_says(
    shapes: list[tuple[int, int, bool]], more_tokens: int, more_sequences: int
) -> None:
    chunks = make(shapes)
    total, count = sum(chunk.count for chunk in chunks), len(chunks)
    layout = Layout(total + more_tokens, count + more_sequences)
    sources = {id(chunk.sequence): row for row, chunk in enumerate(chunks)}
    batch = pack(chunks, layout, SIZE, sources, pinned=False)
    assert batch.num_tokens == total
    field = {name: view.tolist() for name, view in layout.views(batch.packed).items()}
    tables = batch.packed[layout.size :].view(count, batch.width)

    row = 0
    for number, chunk in enumerate(chunks):
        sequence, rows = chunk.sequence, slice(row, row + chunk.count)
        assert field["positions"][rows] == list(range(chunk.start, chunk.end))
        assert field["slot_mapping"][rows] == slots(sequence.blocks, chunk.start, chunk.count, SIZE)
        for token, given_id, source in zip(
            sequence.tokens[chunk.start : chunk.end],
            field["input_ids"][rows],
            field["source"][rows],
            strict=True,
        ):
            assert (given_id, source) == ((0, number) if token == PENDING else (token, -1))
        assert tables[number, : len(sequence.blocks)].tolist() == sequence.blocks
        assert field["query_start"][number : number + 2] == [row, row + chunk.count]
        assert field["context_lens"][number] == chunk.end
        decodes = chunk.count == 1
        assert field["decode_lens"][number] == (chunk.end if decodes else 0)
        assert field["prefill_lens"][number] == (0 if decodes else chunk.end)
        assert field["logits_index"][number] == row + chunk.count - 1
        row += chunk.count
    # Padding is stored nowhere and attends to nothing.
    assert field["slot_mapping"][total:] == [-1] * more_tokens
    assert field["source"][total:] == [-1] * more_tokens
    for name in ("context_lens", "decode_lens", "prefill_lens", "logits_index"):
        assert field[name][count:] == [0] * more_sequences
    assert field["query_start"][count:] == [total] * (more_sequences + 1)
    assert torch.equal(layout.lens(batch.packed)[: count + more_sequences + 1].cpu(),
                       torch.tensor(field["query_start"], dtype=torch.int32))  # fmt: skip


@given(st.data(), st.integers(1, 12))
def test_tables_taken_over_from_the_batch_before(data: st.DataObject, steps: int) -> None:
    """Sequences that decode, pause, move their last block, start anew and come and go: as if packed afresh."""
    memory, fresh = TableMemory(), iter(range(1, 100_000))
    sequences: list[Sequence] = []
    for step in range(steps):
        for number in range(data.draw(st.integers(0, 3))):
            tokens = list(range(1, data.draw(st.integers(2, 20))))
            sequences.append(Sequence(Request(f"{step}-{number}", tokens, SamplingParams()), tokens=tokens))
        chunks = []
        for sequence in data.draw(st.permutations(sequences)):
            event = data.draw(st.sampled_from(["go on"] * 5 + ["pause", "copy on write", "preempt", "end"]))
            if event == "end":
                sequences.remove(sequence)
            elif event == "preempt":
                sequence.blocks, sequence.num_computed = [], 0
            if event in ("pause", "end"):
                continue
            start = sequence.num_computed
            left = len(sequence.tokens) - start
            count = data.draw(st.integers(1, left))
            if event == "copy on write" and start % SIZE:
                sequence.blocks[start // SIZE] = next(fresh)
            while len(sequence.blocks) < blocks_for(start + count, SIZE):
                sequence.blocks.append(next(fresh))
            sequence.num_computed += count
            if count == left:
                sequence.tokens.append(1)
            chunks.append(Chunk(sequence, start, count, int(count == left)))
        if chunks:
            batch = order(chunks)
            layout = Layout(sum(chunk.count for chunk in batch) + 2, len(batch) + 1)
            got = pack(batch, layout, SIZE, {}, pinned=False, memory=memory)
            assert torch.equal(got.packed, pack(batch, layout, SIZE, {}, pinned=False).packed)
