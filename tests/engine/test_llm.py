"""The public interface: shapes, streaming, stopping, and what bad input gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nanopd_lab import LLM, BeamSearchParams, Engine, EngineConfig, EngineParts, SamplingParams
from nanopd_lab.core import Chunk
from nanopd_lab.engine.policies import plan_chunks
from nanopd_lab.errors import InvalidRequestError, NonFiniteLogitsError
from nanopd_lab.kv import BlockAllocator
from nanopd_lab.model.runner import ModelRunner


@pytest.fixture(params=[False, True], ids=["simple loop", "ahead"])
def tiny(request: pytest.FixtureRequest) -> LLM:
    return LLM(
        "random:tiny",
        device="cpu",
        kv_cache_memory_bytes=1 << 20,
        max_num_seqs=8,
        async_scheduling=request.param,
    )


def unharmed(llm: LLM) -> bool:
    llm.engine.check_integrity()
    return llm.stats().blocks.used == 0 and not llm.engine.has_unfinished


# ---------------------------------------------------------------------- shapes


def test_one_prompt_or_many(tiny: LLM) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    (alone,) = tiny.generate([1, 2, 3], params, use_tqdm=False)
    many = tiny.generate(
        [[1, 2, 3], {"prompt_token_ids": [1, 2, 3]}, torch.tensor([1, 2, 3])],  # type: ignore[list-item]
        [params, params, params],
        use_tqdm=False,
    )
    assert len(many) == 3
    for output in many:
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids
        assert output.prompt_token_ids == [1, 2, 3]
        assert output.finished
        assert output.outputs[0].finish_reason == "length"
    assert tiny.generate([], use_tqdm=False) == []
    rows = tiny.generate(np.array([[1, 2, 3], [1, 2, 3]]), params, use_tqdm=False)  # type: ignore[arg-type]
    assert [row.outputs[0].token_ids for row in rows] == [alone.outputs[0].token_ids] * 2
    for lonely in (None, b"bytes"):
        with pytest.raises(InvalidRequestError, match="give text"):
            tiny.generate(lonely, params)  # type: ignore[arg-type]


def test_metrics_add_up(tiny: LLM) -> None:
    prompt = list(range(40))
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    (first,) = tiny.generate([prompt], params, use_tqdm=False)
    (second,) = tiny.generate([prompt], params, use_tqdm=False)
    assert (first.metrics.num_computed_tokens, first.num_cached_tokens) == (44, 0)
    assert (second.metrics.num_computed_tokens, second.num_cached_tokens) == (12, 32)
    m = second.metrics
    assert m.first_scheduled_time is not None
    assert m.first_token_time is not None
    assert m.finished_time is not None
    assert m.arrival_time <= m.first_scheduled_time < m.first_token_time < m.finished_time
    tpot = m.tpot(5)
    assert tpot is not None
    assert m.ttft is not None
    assert m.e2e == pytest.approx(m.ttft + 4 * tpot)


def test_logprobs_have_vllms_shape() -> None:
    llm = LLM("smollm2", device="cpu")
    (output,) = llm.generate(
        "The capital of France is", SamplingParams(max_tokens=3, temperature=0, logprobs=2)
    )
    sample = output.outputs[0]
    assert sample.logprobs is not None
    assert len(sample.logprobs) == len(sample.token_ids) == 3
    for token, entry in zip(sample.token_ids, sample.logprobs, strict=True):
        assert len(entry) == 2
        assert entry[token].rank == 1
        assert entry[token].decoded_token == llm.get_tokenizer().decode([token])
    total = sum(e[t].logprob for t, e in zip(sample.token_ids, sample.logprobs, strict=True))
    assert sample.cumulative_logprob == pytest.approx(total)


def test_stream_grows_and_can_be_left(tiny: LLM) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    lengths = [len(output.outputs[0].token_ids) for output in tiny.stream([5, 6, 7], params)]
    assert lengths == list(range(1, 11))
    for output in tiny.stream([5, 6, 7], params):
        if len(output.outputs[0].token_ids) == 3:
            break
    assert unharmed(tiny)


@pytest.mark.timeout(60)
def test_streams_and_generate_may_take_turns(tiny: LLM) -> None:
    """Each steps the engine for all; what it steps for others is not lost to them."""
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    alone = [tiny.generate([prompt], params, use_tqdm=False)[0].outputs for prompt in ([5, 6], [7], [8])]
    turns = list(zip(tiny.stream([5, 6], params), tiny.stream([7], params), strict=True))
    assert [last.outputs for last in turns[-1]] == alone[:2]
    outer = tiny.stream([5, 6], params)
    first = next(outer)
    assert tiny.generate([8], params, use_tqdm=False)[0].outputs == alone[2]
    assert [first, *outer][-1].outputs == alone[0]
    assert unharmed(tiny)


def test_a_stream_that_nobody_reads_leaves_nothing_behind(tiny: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="empty"):
        tiny.stream([])
    tiny.stream([5, 6, 7])
    assert unharmed(tiny)


def test_engine_steps_one_token_at_a_time_and_aborts() -> None:
    engine = Engine(EngineConfig("random:tiny", device="cpu"))
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True))
    engine.add_request("b", [4], SamplingParams(max_tokens=2, ignore_eos=True))
    assert {output.request_id for output in engine.step()} == {"a", "b"}
    partial = engine.abort("a")
    assert partial is not None
    assert partial.outputs[0].finish_reason == "abort"
    assert len(partial.outputs[0].token_ids) == 1
    assert engine.abort("a") is None
    (last,) = engine.step()
    assert (last.request_id, last.finished) == ("b", True)
    assert engine.step() == []
    engine.check_integrity()
    assert engine.stats().blocks.used == 0


# ---------------------------------------------------------------------- stopping


def first_tokens(llm: LLM, count: int) -> list[int]:
    params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
    return llm.generate([[9, 8, 7]], params, use_tqdm=False)[0].outputs[0].token_ids


def test_stop_token_ids_and_min_tokens(tiny: LLM) -> None:
    tokens = first_tokens(tiny, 6)
    stop = tokens[2]
    place = tokens.index(stop)
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    sample = tiny.generate([[9, 8, 7]], params, use_tqdm=False)[0].outputs[0]
    assert sample.token_ids == tokens[: place + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    params = SamplingParams(max_tokens=6, min_tokens=6, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    sample = tiny.generate([[9, 8, 7]], params, use_tqdm=False)[0].outputs[0]
    assert len(sample.token_ids) == 6
    assert stop not in sample.token_ids[:5], "a stop token was drawn before min_tokens"


def test_stop_strings_cut_the_text() -> None:
    llm = LLM("smollm2", device="cpu")
    plain = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    text = llm.generate("1, 2, 3,", plain, use_tqdm=False)[0].outputs[0].text
    assert " 6" in text
    for keep in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=20, stop=[" 6", "nowhere"], include_stop_str_in_output=keep
        )
        sample = llm.generate("1, 2, 3,", params, use_tqdm=False)[0].outputs[0]
        end = text.index(" 6") + (2 if keep else 0)
        assert sample.text == text[:end]
        assert (sample.finish_reason, sample.stop_reason) == ("stop", " 6")
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop=" 6", min_tokens=18)
    sample = llm.generate("1, 2, 3,", params, use_tqdm=False)[0].outputs[0]
    assert (sample.text, sample.finish_reason) == (text, "length"), "text was cut out of the middle"
    assert unharmed(llm)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 2, 512], {}, "prompt token 2 is 512; token ids are integers from 0 to 511"),
        ([-1], {}, "prompt token 0 is -1"),
        ([1, "x"], {}, "prompt token 1 is 'x'"),
        ([1, True], {}, "prompt token 1 is True"),
        (None, {}, "the prompt is None; give text"),
        (5, {}, "the prompt is 5; give text"),
        (b"bytes", {}, "the prompt is b'bytes'; give text"),
        ({"prompt": 5}, {}, "the prompt is 5; give text"),
        ("text", {}, "has no tokenizer; give the prompt as token ids"),
        ([1], {"stop": "x"}, "use stop_token_ids instead of stop"),
        ([1], {"n": 9}, "max_num_seqs = 8"),
        ([1], {"max_tokens": 10**6}, "over the limit max_model_len"),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(
    tiny: LLM, prompt: Any, params: dict[str, Any], message: str
) -> None:
    vocab = tiny.engine.loaded.geometry.vocab_size
    message = message.replace("511", str(vocab - 1)).replace("512", str(vocab))
    prompt = [vocab if token == 512 else token for token in prompt] if isinstance(prompt, list) else prompt
    good = SamplingParams(max_tokens=2)
    bad = SamplingParams(**params)
    with pytest.raises(InvalidRequestError, match=message):
        tiny.generate([[1, 2], prompt], [good, bad], use_tqdm=False)
    assert unharmed(tiny)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("max_tokens", 0),
        ("min_tokens", 99),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2.0),
        ("logprobs", -1),
        ("logprobs", 10_000),
        ("seed", 2**64),
        ("stop", [""]),
        ("stop_token_ids", [-5]),
        ("n", 1.5),
        ("n", True),
        ("max_tokens", None),
        ("min_tokens", 2.5),
        ("logprobs", 2.5),
        ("logprobs", True),
        ("seed", "x"),
        ("temperature", "0.5"),
        ("top_p", None),
        ("stop", b"bytes"),
        ("stop", [3]),
        ("stop", 3),
        ("stop_token_ids", 5),
        ("stop_token_ids", [True]),
    ],
)
def test_sampling_params_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        SamplingParams(**{field: value})


def test_integers_may_be_numpys() -> None:
    params = SamplingParams(max_tokens=np.int64(5), seed=np.uint8(3), temperature=np.float32(0.5))  # type: ignore[arg-type]
    assert params == SamplingParams(max_tokens=5, seed=3, temperature=0.5)
    assert type(params.max_tokens) is int


def test_beam_params_name_the_field() -> None:
    with pytest.raises(InvalidRequestError, match=r"beam_width is 1\.5"):
        BeamSearchParams(1.5, 5)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="beam_width is 0"):
        BeamSearchParams(0, 5)
    with pytest.raises(InvalidRequestError, match="max_tokens is 0"):
        BeamSearchParams(2, 0)


def test_one_params_each_or_one_for_all(tiny: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="2 prompts but 3 sampling_params"):
        tiny.generate([[1], [2]], [SamplingParams()] * 3, use_tqdm=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of"),
        ({"dtype": "float16"}, "'float16' on a CPU"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"block_size": 0}, "block_size is 0"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens is -1"),
        ({"max_model_len": 10**7}, "has only .* positions"),
        ({"kv_cache_memory_bytes": 10}, "one block of 16 tokens takes"),
        ({"seed": 2**64}, "seed is 18446744073709551616; it must"),
        ({"attention_backend": "flash"}, "'flash' is unknown"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("random:tiny", **{"device": "cpu", **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(ValueError, match=r"'cuda', but this machine has 0 CUDA device.*device='cpu'"):
        LLM("random:tiny", device="cuda")


def test_non_finite_logits_end_the_request_and_nothing_else(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = ModelRunner.logits

    def poisoned(self: ModelRunner, chunks: tuple[Chunk, ...]) -> torch.Tensor:
        out = logits(self, chunks).clone()
        sampled = [chunk for chunk in chunks if chunk.samples]
        for row, chunk in enumerate(sampled):
            if chunk.end == chunk.sequence.prompt_len + 2 and chunk.sequence.request.params.seed == 13:
                out[row] = float("nan")
        return out

    monkeypatch.setattr(ModelRunner, "logits", poisoned)
    engine = tiny.engine
    engine.add_request("good", [1, 2], SamplingParams(max_tokens=6, seed=1, ignore_eos=True))
    engine.add_request("bad", [1, 2], SamplingParams(max_tokens=6, seed=13, ignore_eos=True))
    done = {}
    while engine.has_unfinished:
        done |= {output.request_id: output.outputs[0] for output in engine.step()}
    assert (done["good"].finish_reason, len(done["good"].token_ids)) == ("length", 6)
    assert (done["bad"].finish_reason, len(done["bad"].token_ids)) == ("error", 2)
    assert unharmed(tiny)
    with pytest.raises(NonFiniteLogitsError, match=r"prompt 0: .*non-finite logits.* after 2 tokens"):
        tiny.generate([[1, 2]], SamplingParams(max_tokens=6, seed=13, ignore_eos=True), use_tqdm=False)
    assert unharmed(tiny)


def test_chat_needs_a_template_and_whole_messages(tiny: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="has no chat template"):
        tiny.chat([{"role": "user", "content": "hi"}])
    llm = LLM("smollm2", device="cpu")
    with pytest.raises(InvalidRequestError, match="lacks 'role' or 'content'"):
        llm.chat([{"role": "user"}])
    for content in (None, 5):
        with pytest.raises(InvalidRequestError, match="is no text"):
            llm.chat([{"role": "user", "content": content}])
    for nothing in ([], [[]]):
        with pytest.raises(InvalidRequestError, match="the conversation is empty"):
            llm.chat(nothing)
    hello = {"role": "user", "content": "hi"}
    with pytest.raises(InvalidRequestError, match="give a list of messages"):
        llm.chat(hello)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="the chat template refuses the conversation"):
        llm.chat([hello], chat_template="{{ raise_exception('no users here') }}")


# ---------------------------------------------------------------------- parts


def test_own_parts_are_used_and_give_the_same_tokens(tiny: LLM) -> None:
    calls: list[tuple[int, int]] = []

    class Counting(BlockAllocator):
        def allocate(self, count: int) -> list[int]:
            calls.append((count, self.num_free))
            return super().allocate(count)

    def small_chunks(num_decodes: int, prefills: Any, budget: int) -> list[int]:
        return plan_chunks(num_decodes, [min(remaining, 5) for remaining in prefills], budget)

    parts = EngineParts(allocator=Counting, chunk_policy=small_chunks)
    llm = LLM("random:tiny", device="cpu", parts=parts)
    prompt, params = list(range(50)), SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    ours = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    assert ours == tiny.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.stats().steps == 10 + 3
    assert sum(count for count, _ in calls) == 4


def test_kv_memory_is_one_allocation_of_the_size_asked_for() -> None:
    llm = LLM("random:tiny", device="cpu", kv_cache_memory_bytes=1_000_000)
    cache = llm.engine.cache
    assert cache.num_bytes <= 1_000_000 < cache.num_bytes + cache.shape.block_bytes
    assert cache.tensor.is_contiguous()
    assert cache.layer(1).untyped_storage().data_ptr() == cache.tensor.untyped_storage().data_ptr()


def test_another_engine_on_the_same_weights() -> None:
    llm = LLM("random:tiny", device="cpu")
    small = llm.reconfigured(max_num_batched_tokens=5, kv_cache_memory_bytes=1 << 18)
    assert small.engine.loaded is llm.engine.loaded
    assert small.engine.scheduler.budget == 5
    assert small.engine.cache.num_blocks < llm.engine.cache.num_blocks
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [list(range(1, 30)), [3, 4]]
    here, there = (engine.generate(prompts, params, use_tqdm=False) for engine in (llm, small))
    assert [o.outputs[0].token_ids for o in here] == [o.outputs[0].token_ids for o in there]
    with pytest.raises(ValueError, match="dtype cannot be changed on loaded weights; these can: "):
        llm.reconfigured(dtype="bfloat16")
    with pytest.raises(ValueError, match="budget cannot be changed"):
        llm.reconfigured(budget=3)
    with pytest.raises(ValueError, match="block_size is 0"):
        llm.reconfigured(block_size=0)


@pytest.mark.parametrize("wrong", [{"max_tokens": 3}, 5, "greedy", [5], [{"max_tokens": 3}]])
def test_other_things_than_sampling_params_are_refused(wrong: Any) -> None:
    llm = LLM("random:tiny", device="cpu", kv_cache_memory_bytes=1 << 20)
    for use in (llm.generate, llm.stream):
        with pytest.raises(InvalidRequestError, match=r"sampling_params is .*; give SamplingParams"):
            use([1, 2, 3], wrong)
    for params in (wrong, SamplingParams()):
        with pytest.raises(InvalidRequestError, match=r"params is .*; give BeamSearchParams"):
            llm.beam_search([[1, 2, 3]], params)  # type: ignore[arg-type]
    assert not llm.engine.has_unfinished
