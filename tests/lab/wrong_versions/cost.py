"""Versions of the exercises on what a step costs."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import lsq_linear, nnls

from nanopd_lab.cost.fitting import FitError, errors
from nanopd_lab.cost.iteration import StepFeatures
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


def counts_the_past_as_new(chunks):
    right = StepFeatures.of(chunks)
    return StepFeatures(right.context, right.drawn, right.pairs, right.context, right.sequences)


def everybody_draws(chunks):
    right = StepFeatures.of(chunks)
    return StepFeatures(right.tokens, len(chunks), right.pairs, right.context, right.sequences)


def no_mask(chunks):
    pairs = sum(c.count * (c.past + c.count) for c in chunks)
    right = StepFeatures.of(chunks)
    return StepFeatures(right.tokens, right.drawn, pairs, right.context, right.sequences)


def past_pairs_only(chunks):
    pairs = sum(c.count * c.past for c in chunks)
    right = StepFeatures.of(chunks)
    return StepFeatures(right.tokens, right.drawn, pairs, right.context, right.sequences)


def whole_diagonal(chunks):
    right = StepFeatures.of(chunks)
    return StepFeatures(
        right.tokens, right.drawn, sum(c.pairs for c in chunks), right.context, right.sequences
    )


def half_as_a_whole_number(chunks):
    pairs = sum(c.count * (c.past + c.count // 2) for c in chunks)
    right = StepFeatures.of(chunks)
    return StepFeatures(right.tokens, right.drawn, pairs, right.context, right.sequences)


def product_of_sums(chunks):
    pairs = sum(c.count for c in chunks) * sum(c.past + c.count / 2 for c in chunks)
    right = StepFeatures.of(chunks)
    return StepFeatures(right.tokens, right.drawn, pairs, right.context, right.sequences)


def context_of_the_past(chunks):
    right = StepFeatures.of(chunks)
    context = sum(c.past for c in chunks)
    return StepFeatures(right.tokens, right.drawn, right.pairs, context, right.sequences)


def context_for_each_token(chunks):
    right = StepFeatures.of(chunks)
    context = sum(c.count * (c.past + c.count) for c in chunks)
    return StepFeatures(right.tokens, right.drawn, right.pairs, context, right.sequences)


def merges_equal_chunks(chunks):
    right = StepFeatures.of(chunks)
    return StepFeatures(right.tokens, right.drawn, right.pairs, right.context, len(set(chunks)))


def first_chunk_only(chunks):
    return StepFeatures.of(chunks[:1])


def only_tokens(chunks):
    return sum(c.count for c in chunks)


def in_another_order(chunks):
    right = StepFeatures.of(chunks)
    return StepFeatures(right.sequences, right.drawn, right.pairs, right.context, right.tokens)


def sorts_its_chunks(chunks):
    if isinstance(chunks, list):
        chunks.sort(key=lambda c: c.count)
        chunks.append(chunks[0])
        del chunks[0]
    return StepFeatures.of(chunks)


_seen = {}


def remembers_by_length(chunks):
    return _seen.setdefault(len(chunks), StepFeatures.of(chunks))


def one_loop(chunks):
    tokens = drawn = context = 0
    pairs = 0.0
    for c in chunks:
        tokens += c.count
        if c.samples:
            drawn += 1
        pairs += c.count * c.past + c.count**2 / 2
        context += c.past + c.count
    return StepFeatures(tokens, drawn, pairs, context, len(chunks))


def from_exact_pairs(chunks):
    q, k = np.array([[c.count, c.past] for c in chunks]).T
    drawn = sum(1 for c in chunks if c.samples)
    pairs = sum(c.pairs for c in chunks) - int(q.sum()) / 2
    return StepFeatures(int(q.sum()), drawn, float(pairs), int((q + k).sum()), len(q))


def least_seconds(terms, seconds):
    size = np.linalg.norm(terms, axis=0)
    size[size == 0] = 1
    return nnls(terms / size, seconds)[0] / size


def negative_allowed(terms, seconds):
    return np.linalg.lstsq(terms / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]


def cut_at_zero(terms, seconds):
    return np.maximum(negative_allowed(terms, seconds), 0)


def without_sign(terms, seconds):
    return np.abs(negative_allowed(terms, seconds))


def no_intercept(terms, seconds):
    scaled = terms / seconds[:, None]
    if terms.shape[1] == 1:
        return nnls(scaled, np.ones(len(seconds)))[0]
    return np.append(0.0, nnls(scaled[:, 1:], np.ones(len(seconds)))[0])


def leaves_the_first_out(terms, seconds):
    if terms.shape[1] == 1:
        return nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]
    return nnls(terms[:, 1:] / seconds[:, None], np.ones(len(seconds)))[0]


def forgets_to_scale_back(terms, seconds):
    scaled = terms / seconds[:, None]
    size = np.linalg.norm(scaled, axis=0)
    size[size == 0] = 1
    return nnls(scaled / size, np.ones(len(seconds)))[0]


def divides_by_nothing(terms, seconds):
    scaled = terms / seconds[:, None]
    size = np.linalg.norm(scaled, axis=0)
    if not size.all():
        return np.full(terms.shape[1], np.nan)
    return nnls(scaled / size, np.ones(len(seconds)))[0] / size


def weights_by_the_root(terms, seconds):
    root = np.sqrt(seconds)
    return nnls(terms / root[:, None], root)[0]


def divides_in_place(terms, seconds):
    terms /= seconds[:, None]
    return nnls(terms, np.ones(len(seconds)))[0]


def with_the_distance(terms, seconds):
    return nnls(terms / seconds[:, None], np.ones(len(seconds)))


def one_term_at_a_time(terms, seconds):
    found, left = np.zeros(terms.shape[1]), np.ones(len(seconds))
    for n, column in enumerate((terms / seconds[:, None]).T):
        if column.any():
            found[n] = max(0.0, column @ left / (column @ column))
            left = left - found[n] * column
    return found


def all_zero(terms, seconds):
    return np.zeros(terms.shape[1])


def plain_nnls(terms, seconds):
    return nnls(terms / seconds[:, None], np.ones(len(seconds)))[0]


def every_subset(terms, seconds):
    scaled, best = terms / seconds[:, None], None
    for used in itertools.product((False, True), repeat=terms.shape[1]):
        found = np.zeros(terms.shape[1])
        if any(used):
            columns = scaled[:, used]
            size = np.linalg.norm(columns, axis=0)
            size[size == 0] = 1
            found[list(used)] = np.linalg.lstsq(columns / size, np.ones(len(seconds)), rcond=None)[0] / size
        loss = ((scaled @ found - 1) ** 2).sum()
        if (found >= 0).all() and (best is None or loss < best[0]):
            best = loss, found
    return best[1]


def bounded(terms, seconds):
    scaled = terms / seconds[:, None]
    size = np.linalg.norm(scaled, axis=0) + 1e-300
    found = lsq_linear(scaled / size, np.ones(len(seconds)), bounds=(0, np.inf), method="bvls").x
    return [float(each) for each in np.where(scaled.any(axis=0), found / size, 0.0)]


def tests_on_everything(model, samples, fitted):
    return errors(model, samples)


def tests_on_fitted(model, samples, fitted):
    return errors(model, fitted or samples)


def compares_samples(model, samples, fitted):
    return errors(model, [s for s in samples if s not in fitted])


def compares_identity(model, samples, fitted):
    known = {id(s) for s in fitted}
    return errors(model, [s for s in samples if id(s) not in known])


def only_as_often(model, samples, fitted):
    known = {s.step for s in fitted}
    new = {s.step: s for s in samples if s.step not in known}
    return errors(model, list(new.values()))


def leaves_the_first_ones(model, samples, fitted):
    return errors(model, samples[len(fitted) :])


def with_sign(model, samples, fitted):
    known = {s.step for s in fitted}
    found = [model.of_features(s.step) / s.seconds - 1 for s in samples if s.step not in known]
    return FitError(len(found), sum(found) / len(found), max(map(abs, found)))


def maximum_with_sign(model, samples, fitted):
    known = {s.step for s in fitted}
    found = [model.of_features(s.step) / s.seconds - 1 for s in samples if s.step not in known]
    return FitError(len(found), sum(map(abs, found)) / len(found), max(found))


def relative_to_predicted(model, samples, fitted):
    known = {s.step for s in fitted}
    found = [abs(s.seconds / model.of_features(s.step) - 1) for s in samples if s.step not in known]
    return FitError(len(found), sum(found) / len(found), max(found))


def in_seconds(model, samples, fitted):
    known = {s.step for s in fitted}
    found = [abs(s.seconds - model.of_features(s.step)) for s in samples if s.step not in known]
    return FitError(len(found), sum(found) / len(found), max(found))


def in_percent(model, samples, fitted):
    known = {s.step for s in fitted}
    found = [100 * abs(model.of_features(s.step) / s.seconds - 1) for s in samples if s.step not in known]
    return FitError(len(found), sum(found) / len(found), max(found))


def root_mean_square(model, samples, fitted):
    known = {s.step for s in fitted}
    found = [abs(model.of_features(s.step) / s.seconds - 1) for s in samples if s.step not in known]
    return FitError(len(found), float(np.sqrt(np.mean(np.square(found)))), max(found))


def of_the_device_alone(model, samples, fitted):
    known = {s.step for s in fitted}
    found = [abs(model.device_seconds(s.step) / s.seconds - 1) for s in samples if s.step not in known]
    return FitError(len(found), sum(found) / len(found), max(found))


def zero_where_none_is_left(model, samples, fitted):
    known = {s.step for s in fitted}
    new = [s for s in samples if s.step not in known]
    return errors(model, new) if new else FitError(0, 0.0, 0.0)


def only_the_mean(model, samples, fitted):
    known = {s.step for s in fitted}
    return errors(model, [s for s in samples if s.step not in known]).mean


def with_a_list(model, samples, fitted):
    fitted_steps = [s.step for s in fitted]
    found = [
        abs(s.seconds - model.of_features(s.step)) / s.seconds for s in samples if s.step not in fitted_steps
    ]
    if not found:
        raise ValueError("no step is left")
    return FitError(len(found), float(np.mean(found)), max(found))


def in_a_loop(model, samples, fitted):
    count, total, most = 0, 0.0, 0.0
    for sample in samples:
        if any(sample.step == other.step for other in fitted):
            continue
        error = abs(1 - model.of_features(sample.step) / sample.seconds)
        count, total, most = count + 1, total + error, max(most, error)
    if count == 0:
        raise ValueError("every step was fitted")
    return FitError(count=count, mean=total / count, maximum=most)


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
    "cost.features": [
        (no_mask, "nobody looks at later tokens"),
        (counts_the_past_as_new, "the past is computed already"),
        (everybody_draws, "not every chunk draws"),
        (past_pairs_only, "look at each other too"),
        (whole_diagonal, "the diagonal whole"),
        (half_as_a_whole_number, "q/2 is not a whole number"),
        (product_of_sums, "sees its own tokens only"),
        (context_of_the_past, "K and V are read too"),
        (context_for_each_token, "once a chunk, not once a token"),
        (merges_equal_chunks, "alike is not the same"),
        (first_chunk_only, "new tokens of all chunks"),
        (only_tokens, "StepFeatures(tokens, drawn, pairs, context, sequences) is wanted"),
        (in_another_order, "tokens is 2, not 5"),
        (sorts_its_chunks, "the caller still needs chunks"),
        (remembers_by_length, "pairs is 0.5, not 7.5"),
    ],
    "cost.fit_terms": [
        (least_seconds, "the least error in seconds"),
        (negative_allowed, "no part of a step gives time back"),
        (cut_at_zero, "the others must be fitted again"),
        (without_sign, "can be had"),
        (no_intercept, "the first term counts too"),
        (leaves_the_first_out, "one coefficient for each of 2 terms"),
        (forgets_to_scale_back, "can be had"),
        (divides_by_nothing, "also of a term no step has"),
        (weights_by_the_root, "can be had"),
        (divides_in_place, "the caller still needs terms"),
        (with_the_distance, "one coefficient for each"),
        (one_term_at_a_time, "can be had"),
        (all_zero, "can be had"),
    ],
    "cost.held_out_error": [
        (tests_on_everything, "what was fitted is no test"),
        (tests_on_fitted, "are new to the model"),
        (compares_samples, "compare steps, not times"),
        (compares_identity, "compare steps, not times"),
        (only_as_often, "are new to the model"),
        (leaves_the_first_ones, "mean and maximum of"),
        (with_sign, "must not cancel"),
        (maximum_with_sign, "mean and maximum of"),
        (relative_to_predicted, "not to what was predicted"),
        (in_seconds, "relative errors, not seconds"),
        (in_percent, "shares of 1, not of 100"),
        (root_mean_square, "not the root of the mean square"),
        (of_the_device_alone, "mean and maximum of"),
        (zero_where_none_is_left, "this must raise ValueError"),
        (only_the_mean, "a FitError(count, mean, maximum) is wanted"),
    ],
}

RIGHT: dict[str, list[Version]] = {
    "cost.arithmetic_intensity": [from_scratch, by_cost],
    "cost.time_per_output_token": [tpot_from_scratch, tpot_by_intensity],
    "cost.features": [one_loop, from_exact_pairs],
    "cost.fit_terms": [plain_nnls, every_subset, bounded],
    "cost.held_out_error": [with_a_list, in_a_loop],
}
