"""What happens on a GPU before the first request: measure what a step needs, size the pool, capture graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from nanopd_lab.core import Chunk, Request, SamplingParams, Sequence, StepPlan
from nanopd_lab.kernels.products import most_rows
from nanopd_lab.kv import blocks_for
from nanopd_lab.kv.cache import KVCache, KVShape
from nanopd_lab.model.batch import order
from nanopd_lab.model.compilation import compile_model
from nanopd_lab.model.graphs import DECODE_SIZES, MIXED_SIZES, GraphSet, sizes_up_to

if TYPE_CHECKING:
    from nanopd_lab.engine.config import EngineConfig
    from nanopd_lab.model.runner import ModelRunner

GIB = 1 << 30


class OutOfGPUMemoryError(ValueError):
    """The weights and one step leave no room for the KV pool."""


def wide_step(tokens: int, sequences: int, block_size: int, params: SamplingParams) -> tuple[StepPlan, int]:
    """A step of so many tokens, from so many prompts of about one length that all draw; and the blocks it takes."""
    chunks, used = [], 0
    for number in range(sequences):
        length = tokens // sequences + (number < tokens % sequences)
        blocks = list(range(used, used + blocks_for(length, block_size)))
        used += len(blocks)
        sequence = Sequence(Request(f"warm-up-{number}", [0] * length, params), blocks=blocks)
        chunks.append(Chunk(sequence, 0, length, 1))
    return StepPlan(0, tuple(chunks)), used


def widest_step(config: EngineConfig, block_size: int) -> tuple[StepPlan, int]:
    """A step of as many tokens and sequences as the settings allow, and the blocks that it takes.

    It samples with top_p, which takes the most memory behind the model.
    """
    tokens = config.max_num_batched_tokens
    params = SamplingParams(top_p=0.9, seed=0)
    return wide_step(tokens, min(config.max_num_seqs, tokens), block_size, params)


def measure_pool(runner: ModelRunner, shape: KVShape, config: EngineConfig) -> int:
    """Bytes for the KV pool: `gpu_memory_utilization` of the GPU, less what is in use beside a real step.

    Raises:
        OutOfGPUMemoryError: nothing is left; the message says what takes how much and what to lower.
    """
    device = runner.device
    plan, blocks = widest_step(config, shape.block_size)
    free, total = torch.cuda.mem_get_info(device)
    share = int(config.gpu_memory_utilization * total)
    try:
        runner.use_cache(KVCache(shape, blocks, device))
        runner.launch(plan).result()  # compiles, loads kernels, and makes the libraries' workspaces
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        runner.launch(plan).result()
        step = torch.cuda.max_memory_allocated(device) - before
    except torch.OutOfMemoryError as error:
        raise OutOfGPUMemoryError(
            f"one step of {config.max_num_batched_tokens} tokens and {config.max_num_seqs} sequences does not fit: "
            f"{free / GIB:.1f} GiB of {total / GIB:.1f} were free behind the weights. Lower max_num_batched_tokens or "
            "max_num_seqs, or take a smaller model or dtype"
        ) from error
    finally:
        runner.use_cache(KVCache(shape, 1, device))
        gc.collect()
        torch.cuda.empty_cache()
    used = total - torch.cuda.mem_get_info(device)[0]
    pool = share - used - step
    if pool < shape.block_bytes:
        raise OutOfGPUMemoryError(
            f"gpu_memory_utilization = {config.gpu_memory_utilization} of {total / GIB:.1f} GiB is "
            f"{share / GIB:.1f} GiB; {used / GIB:.1f} GiB are in use (weights, and whatever else runs on this GPU) "
            f"and a step takes {step / GIB:.1f} GiB, which leaves no room for the KV pool. Raise "
            "gpu_memory_utilization, or lower max_num_batched_tokens or max_num_seqs"
        )
    return pool


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Have Python find no garbage meanwhile: to free the graphs and the memory of an engine that is gone would break
    a capture under way."""
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def capture_graphs(runner: ModelRunner, config: EngineConfig, max_model_len: int) -> None:
    """Capture the steps that `GraphSet` describes. Decode steps are compiled for their sizes, if so configured."""
    decode = list(config.cuda_graph_sizes or sizes_up_to(DECODE_SIZES, config.max_num_seqs))
    if runner.backend.name != "cuda":  # other backends read lengths on the host
        return
    budget = config.max_num_batched_tokens
    mixed: list[int] = []
    if runner.cache.shape.dtype != torch.float32:  # the paged prefill kernel takes 16-bit types
        mixed = [size for size in MIXED_SIZES if size <= budget]
    graphs = GraphSet(
        runner,
        max_blocks=max(2, blocks_for(max_model_len, runner.cache.shape.block_size)),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        largest=max([*decode, *mixed]),
    )
    mode = config.compilation
    most = most_rows(runner.device)
    with _no_garbage():
        layer = runner.model.base_model.layers[0]
        graphs.capture_mixed(mixed, sum(weights.numel() for weights in layer.parameters()))
        for few_rows in (False, True):
            compile_model(runner.model, mode, few_rows=few_rows)
            graphs.capture_decode(size for size in decode if (size <= most) == few_rows)
    # What is not captured goes on with symbolic sizes.
    compile_model(runner.model, "off" if mode == "off" else "default")
    runner.graphs = graphs
    _settle(runner, config, max_model_len)


def _settle(runner: ModelRunner, config: EngineConfig, max_model_len: int) -> None:
    """Run wide steps that no graph holds: the first request need not wait for compiling or for memory.

    One of few long prompts and one of many short ones, as their attention and their sampling differ.
    """
    assert runner.graphs is not None
    cache = runner.cache
    size = cache.shape.block_size
    # A prompt's last block may be half empty, so that fewer tokens than the pool's may fit.
    tokens = min(config.max_num_batched_tokens, (cache.num_blocks - config.max_num_seqs) * size)
    greedy, sampled = SamplingParams(temperature=0), SamplingParams(top_p=0.9, seed=0)
    for sequences, params in ((-(-tokens // max_model_len), greedy), (config.max_num_seqs, sampled)):
        if not tokens >= sequences > 0:
            continue
        plan, _ = wide_step(tokens, sequences, size, params)
        if runner.graphs.find(order(plan.chunks)) is None:
            runner.launch(plan).result()
    torch.cuda.synchronize(runner.device)
