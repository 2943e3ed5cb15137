"""What one GPU does through the whole engine: step times, time to first token, throughput, and where time goes.

    nanopd-lab bench-engine --model random:qwen3-8b --modes eager off default --result-filename engine.json

Everything is measured in one process against the ceilings of the same run: a decode step must read every weight and
the KV of its sequences once, a prefill must do its FLOPs. Modes, each faster and slower to start than the one before:

    eager     Hugging Face's operators launched one by one, our attention, no graphs, no lookahead
    off       stacked and few-row products, CUDA graphs, the next step planned while one runs
    default   the small operators compiled
    tuned     products searched for each captured size
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from nanopd_lab import LLM, SamplingParams
from nanopd_lab.bench.breakdown import break_down
from nanopd_lab.bench.ceilings import measure_ceilings
from nanopd_lab.bench.offline import decode_step_ms
from nanopd_lab.cost.roofline import ChunkShape, ModelDims, step_cost
from nanopd_lab.provenance import provenance

SCHEMA = "nanopd-lab/engine/1"
MODES: dict[str, dict[str, Any]] = {
    "eager": {"compilation": "off", "cuda_graphs": False, "async_scheduling": False, "optimise": False},
    "off": {"compilation": "off"},
    "default": {"compilation": "default"},
    "tuned": {"compilation": "tuned"},
}
Report = Callable[[str], None]
Requests = tuple[list[list[int]], list[int]]


def uniform_64() -> Requests:
    """64 prompts of 100 to 1,024 random tokens, 128 new tokens each."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 150_000) for _ in range(rng.randint(100, 1024))] for _ in range(64)]
    return prompts, [128] * 64


def nano_vllm_256() -> Requests:
    """nano-vllm's benchmark: 256 prompts and outputs of 100 to 1,024 tokens (142,827 in, 133,966 out)."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    return prompts, [rng.randint(100, 1024) for _ in range(256)]


WORKLOADS: dict[str, Callable[[], Requests]] = {"64": uniform_64, "256": nano_vllm_256}


def throughput(llm: LLM, requests: Requests, temperature: float = 0.0) -> dict[str, float]:
    """Output tokens a second of all requests at once, and the mean time to first token."""
    prompts, lengths = requests
    params = [
        SamplingParams(temperature=temperature, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in lengths
    ]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    assert tokens == sum(lengths), f"{tokens} tokens, not {sum(lengths)}"
    ttft = statistics.mean(output.metrics.ttft or 0.0 for output in outputs)
    return {"seconds": seconds, "output_tokens_per_s": tokens / seconds, "mean_ttft_s": ttft}


def ttft_ms(llm: LLM, length: int, rounds: int = 9) -> float:
    """Median milliseconds from `generate` to its first and only token, for one prompt."""
    rng, times = random.Random(length), []
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    vocab = llm.engine.loaded.geometry.vocab_size
    for _ in range(rounds + 1):
        prompt = [rng.randrange(vocab) for _ in range(length)]
        start = time.perf_counter()
        llm.generate([prompt], params, use_tqdm=False)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def decode_breakdown(llm: LLM, batch: int, context: int) -> dict[str, Any]:
    """Microseconds of a decode step by what they are for; see `bench.breakdown`."""
    engine, params = llm.engine, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    names = [f"profiled-{number}" for number in range(batch)]
    for number, name in enumerate(names):
        engine.add_request(name, [(7 * number + j) % 50_000 for j in range(context)], params)
    while engine.scheduler.waiting or not all(s.is_decoding for s in engine.scheduler.running):
        engine.step()
    found = break_down(engine.step, repeats=6)
    for name in names:
        engine.abort(name)
    engine.step()
    return {
        "by_kind_us": found.by_kind,
        "kernels": sum(found.launches.values()),
        "busy_us": found.busy_us,
        "span_us": found.span_us,
        "longest_us": dict(list(found.by_kernel.items())[:8]),
    }


def limits(
    dims: ModelDims, read: float, flops: float, batches: Iterable[int], context: int, lengths: Iterable[int]
) -> dict[str, float]:
    """Milliseconds that bytes (decode) and FLOPs (prefill) take at the measured ceilings."""
    decode = {
        f"decode_{batch}": step_cost(dims, [ChunkShape(1, context)] * batch).bytes / read * 1e3
        for batch in batches
    }
    prefill = {
        f"ttft_{length}": step_cost(dims, [ChunkShape(length)]).flops / flops * 1e3 for length in lengths
    }
    return {**decode, **prefill}


def run_engine(
    model: str = "random:qwen3-8b",
    modes: Sequence[str] = ("eager", "off", "default"),
    *,
    dtype: str = "bfloat16",
    batches: Sequence[int] = (1, 8, 32, 64),
    context: int = 512,
    prompt_lengths: Sequence[int] = (512, 2048),
    workloads: Sequence[str] = ("64", "256"),
    peer: bool = False,
    rounds: int = 2,
    max_num_batched_tokens: int = 8192,
    report: Report = print,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measure `model` in each mode; `save` gets the record after every part, so that a cut run leaves what it has.

    Args:
        workloads: names of WORKLOADS, run in the compiled modes
        peer: also run the first workload through Hugging Face's `generate_batch` (random weights only)

    Raises:
        ValueError: an unknown mode or workload, or no GPU.
    """
    if unknown := [*(set(modes) - set(MODES)), *(set(workloads) - set(WORKLOADS))]:
        raise ValueError(
            f"unknown {unknown[0]!r}; modes are {', '.join(MODES)}, workloads {', '.join(WORKLOADS)}"
        )
    if not torch.cuda.is_available():
        raise ValueError("bench-engine measures a GPU, and torch sees none; bench-offline runs on a CPU")
    ceilings = measure_ceilings("cuda", [dtype])
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "provenance": provenance(),
        "device": ceilings.device,
        "model": model,
        "dtype": dtype,
        "context": context,
        "max_num_batched_tokens": max_num_batched_tokens,
        "ceilings": vars(ceilings),
        "modes": {},
    }
    report(f"{ceilings.device}: read {ceilings.read_bytes_per_s / 1e9:.0f} GB/s")
    for mode in modes:
        compiled = MODES[mode]["compilation"] != "off"
        requests = {name: WORKLOADS[name]() for name in workloads} if compiled else {}
        seqs = max([*batches, *(len(prompts) for prompts, _ in requests.values())])
        start = time.perf_counter()
        llm = LLM(
            model,
            dtype=dtype,
            device="cuda",
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=seqs,
            max_model_len=4096,
            enable_prefix_caching=False,
            # Tuning takes tens of seconds a size.
            cuda_graph_sizes=tuple(batches) if mode == "tuned" else None,
            **MODES[mode],
        )
        torch.cuda.synchronize()
        found: dict[str, Any] = {"startup_s": time.perf_counter() - start}
        record["modes"][mode] = found
        if "limits" not in record:
            dims = ModelDims.from_config(llm.engine.loaded.model.config, weight_itemsize=2)
            peak = ceilings.matmul_flops_per_s[dtype]
            read = ceilings.read_bytes_per_s
            record["limits"] = limits(dims, read, peak, batches, context, prompt_lengths)
        for batch in batches:
            found[f"decode_{batch}"] = decode_step_ms(llm, [context] * batch, 40)
        for length in prompt_lengths:
            found[f"ttft_{length}"] = ttft_ms(llm, length)
        save(record)
        for number, (name, each) in enumerate(requests.items()):
            if number == 0:
                found[f"first_{name}"] = throughput(llm, each)  # right behind the start
            found[f"requests_{name}"] = [throughput(llm, each) for _ in range(rounds)]
            save(record)
        found["breakdown"] = {f"decode_{b}": decode_breakdown(llm, b, context) for b in (1, batches[-1])}
        save(record)
        report(f"{mode}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items() if isinstance(v, float)))
        del llm
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
    if peer and workloads:
        record["hf_generate_batch"] = _peer(model, dtype, WORKLOADS[workloads[0]]())
        save(record)
    return record


def _peer(model: str, dtype: str, requests: Requests) -> dict[str, float]:
    """Hugging Face's own continuous batching on the same shape, with weights of its own."""
    from nanopd_lab.bench.offline import hf_continuous
    from nanopd_lab.model.shapes import random_model, shape_config

    prompts, lengths = requests
    config = shape_config(model.removeprefix("random:"))
    hf = random_model(
        config, seed=0, dtype=getattr(torch, dtype), device=torch.device("cuda"), attn_implementation="sdpa"
    )
    timing = hf_continuous(hf)(prompts, lengths[0])
    return {"seconds": timing.total_s, "output_tokens_per_s": timing.output_tokens / timing.total_s}


def format_engine(record: dict[str, Any]) -> str:
    """The record as a table for people: a row for each figure, a column for each mode, the limit last."""
    modes = record["modes"]
    width = max(10, *(len(mode) + 2 for mode in modes))
    lines = [f"{record['model']} in {record['dtype']} on {record['device']}", ""]
    lines.append(f"{'ms':16}" + "".join(f"{mode:>{width}}" for mode in modes) + f"{'limit':>{width}}")
    for key, limit in record["limits"].items():
        cells = "".join(f"{found.get(key, float('nan')):{width}.2f}" for found in modes.values())
        lines.append(f"{key:16}{cells}{limit:{width}.2f}")
    for name in WORKLOADS:
        runs = [found.get(f"requests_{name}", []) for found in modes.values()]
        if any(runs):
            rates = [
                statistics.median(run["output_tokens_per_s"] for run in each) if each else float("nan")
                for each in runs
            ]
            lines.append(f"{name + ' requests':16}" + "".join(f"{r:{width},.0f}" for r in rates) + "  tok/s")
    if peer := record.get("hf_generate_batch"):
        lines.append(f"Hugging Face's generate_batch: {peer['output_tokens_per_s']:,.0f} tok/s")
    starts = "".join(f"{found['startup_s']:{width}.1f}" for found in modes.values())
    return "\n".join([*lines, f"{'start-up, s':16}{starts}"])
