"""Offline throughput: many prompts at once, against Hugging Face in the same run.

The peers run the same weights, prompts and output lengths, greedily, in the same process and interleaved
(ours, peer, peer, ours, …), so that a slow moment of a shared machine hits all of them. Medians are compared.

    ours            this engine
    hf-padded       `generate` on one batch, padded to the longest prompt
    hf-continuous   `generate_batch`, Hugging Face's own continuous batching over a paged cache
    hf-sequential   `generate`, one prompt after the other
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.bench.ceilings import read_bytes_per_s
from nanopd_lab.cpu.features import has_bf16_products
from nanopd_lab.provenance import provenance

PEERS = ("hf-padded", "hf-continuous", "hf-sequential")
SCHEMA = "nanopd-lab/offline/1"


@dataclass(frozen=True)
class Workload:
    """Prompts of random token ids, lengths uniform in [min_input_len, max_input_len]."""

    num_prompts: int = 16
    min_input_len: int = 32
    max_input_len: int = 512
    output_len: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min_input_len <= self.max_input_len:
            raise ValueError(
                f"input lengths {self.min_input_len} to {self.max_input_len}: give 1 <= min <= max"
            )
        if self.num_prompts < 1 or self.output_len < 1:
            raise ValueError("num_prompts and output_len must be at least 1")

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids; the first few of a vocabulary are left out, they are special tokens."""
        rng = random.Random(self.seed)
        lengths = [rng.randint(self.min_input_len, self.max_input_len) for _ in range(self.num_prompts)]
        return [[rng.randrange(min(20, vocab_size // 2), vocab_size) for _ in range(n)] for n in lengths]


@dataclass(frozen=True)
class Timing:
    """One run of one system: seconds from submission of all prompts."""

    total_s: float
    mean_ttft_s: float
    output_tokens: int


Run = Callable[[list[list[int]], int], Timing]


def _ours(llm: LLM) -> Run:
    def run(prompts: list[list[int]], output_len: int) -> Timing:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        total = time.perf_counter() - start
        ttfts = [output.metrics.ttft or 0.0 for output in outputs]
        return Timing(total, statistics.mean(ttfts), sum(len(o.outputs[0].token_ids) for o in outputs))

    return run


def _settings(model: Any, output_len: int) -> Any:
    """Greedy, exactly `output_len` tokens, nothing that stops early."""
    settings = copy.deepcopy(model.generation_config)
    # None would mean the model's own, and -1 is complained of: no token has the number of all tokens.
    nothing = model.config.vocab_size
    settings.update(
        max_new_tokens=output_len, min_new_tokens=None, do_sample=False, eos_token_id=nothing, pad_token_id=0
    )
    return settings


class _FirstToken:
    """A stopping criterion that never stops, and notes when it was first asked."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.at is None:
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _hf_batch(model: Any, batch: list[list[int]], output_len: int, start: float) -> tuple[float, int]:
    """One padded `generate`; (seconds from `start` to the first tokens, tokens out)."""
    from transformers import StoppingCriteriaList

    longest = max(map(len, batch))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=model.device)
    first = _FirstToken()
    out = model.generate(
        ids,
        attention_mask=mask,
        generation_config=_settings(model, output_len),
        stopping_criteria=StoppingCriteriaList([first]),
    )
    assert first.at is not None
    return first.at - start, out[:, longest:].numel()


def hf_padded(model: Any) -> Run:
    """Hugging Face's `generate` on one batch, padded to the longest prompt on the left."""

    def run(prompts: list[list[int]], output_len: int) -> Timing:
        start = time.perf_counter()
        ttft, tokens = _hf_batch(model, prompts, output_len, start)
        return Timing(time.perf_counter() - start, ttft, tokens)

    return run


def _hf_sequential(model: Any) -> Run:
    def run(prompts: list[list[int]], output_len: int) -> Timing:
        start = time.perf_counter()
        results = [_hf_batch(model, [prompt], output_len, start) for prompt in prompts]
        return Timing(
            time.perf_counter() - start, statistics.mean(r[0] for r in results), sum(r[1] for r in results)
        )

    return run


def hf_continuous(model: Any) -> Run:
    """Hugging Face's `generate_batch`."""

    def run(prompts: list[list[int]], output_len: int) -> Timing:
        start = time.perf_counter()
        results = model.generate_batch(
            inputs=prompts, generation_config=_settings(model, output_len), record_timestamps=True
        )
        total = time.perf_counter() - start
        outputs = list(results.values())
        assert len(outputs) == len(prompts), "generate_batch lost a prompt"
        ttft = statistics.mean(output.timestamps[0] - output.created_time for output in outputs)
        return Timing(total, ttft, sum(len(output.generated_tokens) for output in outputs))

    return run


def decode_step_ms(llm: LLM, contexts: list[int], steps: int = 20) -> float:
    """Median milliseconds of a decode step over sequences with these context lengths."""
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=steps + 100, ignore_eos=True)
    vocab = engine.loaded.geometry.vocab_size
    rng = random.Random(0)
    names = [f"decode-{time.perf_counter_ns()}-{i}" for i in range(len(contexts))]
    for name, context in zip(names, contexts, strict=True):
        engine.add_request(name, [rng.randrange(vocab // 2, vocab) for _ in range(context)], params)
    while engine.scheduler.waiting or not all(s.is_decoding for s in engine.scheduler.running):
        engine.step()
    times = []
    for _ in range(
        steps
    ):  # of an engine that runs ahead a call ends when the step before has, at the same pace
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
        if not engine.has_unfinished:
            break
    for name in names:
        engine.abort(name)
    return statistics.median(times) * 1e3


def run_offline(
    model: str,
    *,
    dtype: str | None = None,
    workload: Workload | None = None,
    peers: tuple[str, ...] = ("hf-padded", "hf-continuous"),
    rounds: int = 3,
    max_num_batched_tokens: int = 512,
    device: str = "auto",
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the workload on this engine and its peers, interleaved; returns a JSON-ready result.

    Args:
        dtype: None: bfloat16, and float32 on a CPU that has no unit for it

    Raises:
        ValueError: an unknown peer, or a model without a folder that Hugging Face could load.
    """
    from transformers import AutoModelForCausalLM

    workload = workload or Workload()
    unknown = set(peers) - set(PEERS)
    if unknown:
        raise ValueError(f"unknown peers {', '.join(sorted(unknown))}; choose from {', '.join(PEERS)}")
    if dtype is None:
        on_gpu = torch.cuda.is_available() and not device.startswith("cpu")
        dtype = "bfloat16" if on_gpu or has_bf16_products() else "float32"
    llm = LLM(
        model,
        dtype=dtype,
        device=device,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=False,  # every round must compute its prompts
    )
    systems: dict[str, Run] = {"ours": _ours(llm)}
    if peers:
        if llm.model_path is None:
            raise ValueError(
                f"{model} has no folder to load peers from; leave out --peers or name a saved model"
            )
        hf = AutoModelForCausalLM.from_pretrained(llm.model_path, dtype=llm.engine.cache.shape.dtype)
        hf = hf.to(llm.engine.device).eval()
        make = {"hf-padded": hf_padded, "hf-continuous": hf_continuous, "hf-sequential": _hf_sequential}
        systems |= {name: make[name](hf) for name in peers}

    prompts = workload.prompts(llm.engine.loaded.geometry.vocab_size)
    for run in systems.values():  # warm-up: compile, touch memory
        run([prompt[:32] for prompt in prompts[:2]], 4)
    timings: dict[str, list[Timing]] = {name: [] for name in systems}
    for number in range(rounds):
        order = list(systems) if number % 2 == 0 else list(systems)[::-1]
        for name in order:
            timing = systems[name](prompts, workload.output_len)
            expected = workload.num_prompts * workload.output_len
            assert timing.output_tokens == expected, f"{name}: {timing.output_tokens} tokens, not {expected}"
            timings[name].append(timing)
            report(f"round {number + 1}/{rounds}  {name:14} {timing.total_s:7.2f} s")

    weights = llm.engine.loaded.geometry.weight_bytes
    skewed, short, long = (decode_step_ms(llm, c, 12) for c in ([64] * 15 + [2048], [64] * 15, [2048]))
    bandwidth = read_bytes_per_s() if llm.engine.device.type == "cpu" else None
    return {
        "schema": SCHEMA,
        "provenance": provenance(),
        "model": model,
        "dtype": dtype,
        "workload": {**asdict(workload), "total_input_tokens": sum(map(len, prompts))},
        "max_num_batched_tokens": max_num_batched_tokens,
        "rounds": {name: [asdict(timing) for timing in runs] for name, runs in timings.items()},
        "summary": {name: _summary(runs) for name, runs in timings.items()},
        "decode_step_ms": {"batch_1": decode_step_ms(llm, [64]), "batch_16": decode_step_ms(llm, [300] * 16)},
        "skewed_step_ms": {"15x64+1x2048": skewed, "15x64": short, "1x2048": long},
        "limits": {
            "weight_bytes": weights,
            "read_bytes_per_s": bandwidth,
            "decode_step_ms": None if bandwidth is None else weights / bandwidth * 1e3,
        },
    }


def _summary(runs: list[Timing]) -> dict[str, float]:
    total = statistics.median(run.total_s for run in runs)
    return {
        "total_s": total,
        "output_tokens_per_s": runs[0].output_tokens / total,
        "mean_ttft_s": statistics.median(run.mean_ttft_s for run in runs),
    }


def format_offline(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    machine, work = result["provenance"]["machine"], result["workload"]
    ours = result["summary"]["ours"]
    lines = [
        f"{result['model']} in {result['dtype']}, {work['num_prompts']} prompts ({work['total_input_tokens']} tokens), "
        f"{work['output_len']} new tokens each",
        f"machine: {machine['cpu']}, {machine['torch_threads']} threads"
        + "".join(f", {gpu}" for gpu in machine["gpus"]),
        "",
        f"{'system':16}{'total s':>9}{'tok/s':>9}{'TTFT s':>9}{'ours is':>12}{'ours TTFT':>12}",
    ]
    for name, row in result["summary"].items():
        faster = "" if name == "ours" else f"{ours['output_tokens_per_s'] / row['output_tokens_per_s']:.2f} x"
        earlier = "" if name == "ours" else f"{ours['mean_ttft_s'] / row['mean_ttft_s']:.2f} x"
        lines.append(
            f"{name:16}{row['total_s']:9.2f}{row['output_tokens_per_s']:9.1f}{row['mean_ttft_s']:9.2f}"
            f"{faster:>12}{earlier:>12}"
        )
    step, skew, limit = result["decode_step_ms"], result["skewed_step_ms"], result["limits"]
    lines += [
        "",
        f"decode step: {step['batch_1']:.1f} ms at batch 1, {step['batch_16']:.1f} ms at batch 16"
        + (
            f"; reading the weights takes {limit['decode_step_ms']:.1f} ms at the measured "
            f"{limit['read_bytes_per_s'] / 1e9:.1f} GB/s"
            if limit["decode_step_ms"]
            else ""
        ),
        f"skewed step (15 contexts of 64 and one of 2,048): {skew['15x64+1x2048']:.1f} ms; the two parts alone "
        f"{skew['15x64']:.1f} + {skew['1x2048']:.1f} ms",
    ]
    return "\n".join(lines)
