"""Versions of the exercises on what a step costs."""

from __future__ import annotations

from nanopd_lab.cost.roofline import ChunkShape, step_cost, step_flops
from tests.lab.wrong_versions.base import Version


def weights_for_each_token(model, chunks):
    cost = step_cost(model, chunks)
    return cost.flops / (cost.bytes + (cost.tokens - 1) * cost.weight_bytes)


def weights_for_each_sequence(model, chunks):
    cost = step_cost(model, chunks)
    return cost.flops / (cost.bytes + (len(chunks) - 1) * cost.weight_bytes)


def always_reads_the_vocabulary(model, chunks):
    weights = (model.token_weights + model.vocab_weights) * model.weight_itemsize
    cost = step_cost(model, chunks)
    return cost.flops / (cost.bytes - cost.weight_bytes + weights)


def never_reads_the_vocabulary(model, chunks):
    weights = model.token_weights * model.weight_itemsize
    cost = step_cost(model, chunks)
    return cost.flops / (cost.bytes - cost.weight_bytes + weights)


def reads_the_embedding_table(model, chunks):
    cost = step_cost(model, chunks)
    extra = 0 if model.tied_embeddings else model.vocab_weights * model.weight_itemsize
    return cost.flops / (cost.bytes + extra)


def forgets_kv(model, chunks):
    cost = step_cost(model, chunks)
    return cost.flops / (cost.weight_bytes + cost.activation_bytes)


def reads_only_the_past(model, chunks):
    cost = step_cost(model, chunks)
    return cost.flops / (cost.bytes - cost.tokens * model.kv_bytes_per_token)


def forgets_to_write(model, chunks):
    cost = step_cost(model, chunks)
    return cost.flops / (cost.bytes - cost.kv_write_bytes)


def reads_only_the_first(model, chunks):
    cost = step_cost(model, chunks)
    others = sum(c.past + c.count for c in chunks[1:]) * model.kv_bytes_per_token
    return cost.flops / (cost.bytes - others)


def counts_samples_as_rows(model, chunks):
    weights = (model.token_weights + model.vocab_weights) * model.weight_itemsize
    tokens = sum(c.count for c in chunks)
    kv = sum(c.past + 2 * c.count for c in chunks) * model.kv_bytes_per_token
    return step_flops(model, chunks) / (weights + kv + model.activation_bytes(tokens, len(chunks)))


def kv_in_the_weights_type(model, chunks):
    cost = step_cost(model, chunks)
    kv = (cost.kv_read_bytes + cost.kv_write_bytes) // model.kv_itemsize * model.weight_itemsize
    return cost.flops / (cost.weight_bytes + cost.activation_bytes + kv)


def kv_of_all_heads(model, chunks):
    cost = step_cost(model, chunks)
    group = model.num_heads // model.num_kv_heads
    kv = (cost.kv_read_bytes + cost.kv_write_bytes) * group
    return cost.flops / (cost.weight_bytes + cost.activation_bytes + kv)


def no_activations(model, chunks):
    cost = step_cost(model, chunks)
    return cost.flops / (cost.bytes - cost.activation_bytes)


def upside_down(model, chunks):
    cost = step_cost(model, chunks)
    return cost.bytes / cost.flops


def reads_kv_for_each_token(model, chunks):
    cost = step_cost(model, chunks)
    extra = sum(c.pairs - c.past - c.count for c in chunks) * model.kv_bytes_per_token
    return cost.flops / (cost.bytes + extra)


def no_attention(model, chunks):
    cost = step_cost(model, chunks)
    return cost.gemm_flops / cost.bytes


def whole_numbers(model, chunks):
    cost = step_cost(model, chunks)
    return cost.flops // cost.bytes


def forgets_to_return(model, chunks):
    step_flops(model, chunks)


def eats_its_chunks(model, chunks):
    cost = step_cost(model, chunks)
    chunks.pop()
    return cost.intensity


_total = []


def remembers(model, chunks):
    _total.extend(chunks)
    return step_cost(model, _total).intensity


def from_scratch(model, chunks):
    tokens = drawn = kv = 0
    for chunk in chunks:
        tokens += chunk.count
        drawn += 1 if chunk.samples else 0
        kv += (chunk.past + chunk.count) * model.kv_bytes_per_token
    kv += tokens * model.kv_bytes_per_token
    weights = model.token_weights * model.weight_itemsize
    if drawn:
        weights += model.vocab_weights * model.weight_itemsize
    moved = weights + kv + model.activation_bytes(tokens, drawn)
    return step_flops(model, chunks) / moved


def by_cost(model, chunks):
    cost = step_cost(model, list(chunks))
    moved = cost.weight_bytes + cost.kv_read_bytes + cost.kv_write_bytes + cost.activation_bytes
    return (cost.gemm_flops + cost.attention_flops) / moved


def divides_by_the_batch(model, contexts, roof):
    return roof.seconds(step_cost(model, [ChunkShape(1, past) for past in contexts])) / len(contexts)


def one_after_the_other(model, contexts, roof):
    return sum(roof.seconds(step_cost(model, [ChunkShape(1, past)])) for past in contexts)


def adds_up(model, contexts, roof):
    cost = step_cost(model, [ChunkShape(1, past) for past in contexts])
    return cost.bytes / roof.bandwidth_bytes_per_s + cost.flops / roof.peak_flops_per_s


def the_smaller(model, contexts, roof):
    cost = step_cost(model, [ChunkShape(1, past) for past in contexts])
    return min(cost.bytes / roof.bandwidth_bytes_per_s, cost.flops / roof.peak_flops_per_s)


def memory_only(model, contexts, roof):
    return step_cost(model, [ChunkShape(1, past) for past in contexts]).bytes / roof.bandwidth_bytes_per_s


def compute_only(model, contexts, roof):
    return step_cost(model, [ChunkShape(1, past) for past in contexts]).flops / roof.peak_flops_per_s


def milliseconds(model, contexts, roof):
    return 1e3 * roof.seconds(step_cost(model, [ChunkShape(1, past) for past in contexts]))


def as_one_prompt(model, contexts, roof):
    return roof.seconds(step_cost(model, [ChunkShape(len(contexts), max(contexts))]))


def mean_context(model, contexts, roof):
    mean = sum(contexts) // len(contexts)
    return roof.seconds(step_cost(model, [ChunkShape(1, mean)] * len(contexts)))


def context_includes_the_new_token(model, contexts, roof):
    return roof.seconds(step_cost(model, [ChunkShape(1, max(0, past - 1)) for past in contexts]))


def recomputes_the_context(model, contexts, roof):
    return roof.seconds(step_cost(model, [ChunkShape(past + 1) for past in contexts]))


def weights_only(model, contexts, roof):
    return model.weight_bytes / roof.bandwidth_bytes_per_s


def tpot_from_scratch(model, contexts, roof):
    batch, kv = len(contexts), model.kv_bytes_per_token
    weights = (model.token_weights + model.vocab_weights) * model.weight_itemsize
    moved = weights + sum(past + 2 for past in contexts) * kv + model.activation_bytes(batch, batch)
    pairs = sum(past + 1 for past in contexts)
    flops = 2 * batch * (model.token_weights + model.vocab_weights)
    flops += 4 * pairs * model.num_layers * model.num_heads * model.head_dim
    return max(moved / roof.bandwidth_bytes_per_s, flops / roof.peak_flops_per_s)


def tpot_by_intensity(model, contexts, roof):
    cost = step_cost(model, [ChunkShape(1, past) for past in contexts])
    return cost.flops / roof.flops_per_s(cost.intensity)


WRONG: dict[str, list[tuple[Version, str]]] = {
    "cost.arithmetic_intensity": [
        (weights_for_each_sequence, "read once for the whole step"),
        (weights_for_each_token, "read once for the whole step"),
        (always_reads_the_vocabulary, "nobody draws a token"),
        (never_reads_the_vocabulary, "takes the vocabulary projection"),
        (reads_the_embedding_table, "only a row a token is read"),
        (forgets_kv, "the KV is missing"),
        (reads_only_the_past, "counts twice, written and read"),
        (forgets_to_write, "counts twice, written and read"),
        (reads_only_the_first, "every sequence reads its own KV"),
        (counts_samples_as_rows, "(activations)"),
        (kv_in_the_weights_type, "(KV read)"),
        (kv_of_all_heads, "not for query heads"),
        (no_activations, "the activations are missing"),
        (upside_down, "that is bytes over FLOPs"),
        (no_attention, "attention's FLOPs are missing"),
        (reads_kv_for_each_token, "KV is read once a sequence"),
        (whole_numbers, "FLOPs over"),
        (forgets_to_return, "is a `return` missing?"),
        (eats_its_chunks, "the caller still needs chunks"),
        (remembers, "FLOPs over"),
    ],
    "cost.time_per_output_token": [
        (divides_by_the_batch, "nothing is divided"),
        (one_after_the_other, "one step serves all"),
        (adds_up, "not the sum"),
        (the_smaller, "the slower of the two sets the pace"),
        (memory_only, "the slower of the two"),
        (compute_only, "the slower of the two"),
        (milliseconds, "that is in milliseconds"),
        (as_one_prompt, "moving"),
        (mean_context, "moving"),
        (context_includes_the_new_token, "moving"),
        (recomputes_the_context, "moving"),
        (weights_only, "moving"),
    ],
}

RIGHT: dict[str, list[Version]] = {
    "cost.arithmetic_intensity": [from_scratch, by_cost],
    "cost.time_per_output_token": [tpot_from_scratch, tpot_by_intensity],
}
