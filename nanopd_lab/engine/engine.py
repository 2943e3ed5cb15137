"""The engine loop: schedule, run, take in the tokens, turn them into text.

    engine.add_request(...) ──► Scheduler ──StepPlan──► ModelRunner ──tokens──► Scheduler ──► RequestOutput

`step()` is the whole loop; nothing happens between calls. The engine owns the model, the KV pool and the
clock, the scheduler owns every decision.

On a GPU the loop runs one step ahead: a call plans and launches step k + 1, and then takes in the tokens of
step k, while the GPU is busy. The tokens are the same either way (`async_scheduling=False` is the simple loop).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nanopd_lab.attention import check_backend, create_backend
from nanopd_lab.core import BeamSearchParams, FinishReason, Request, SamplingParams, Sequence, StepPlan
from nanopd_lab.engine.beam import BeamGroup
from nanopd_lab.engine.config import EngineConfig
from nanopd_lab.engine.detokenizer import Detokenizer
from nanopd_lab.engine.loop import StepLoop
from nanopd_lab.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, spelled
from nanopd_lab.engine.prompts import Prompt, check_params, tokenize
from nanopd_lab.engine.scheduler import Scheduler
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.kv import AllocatorStats
from nanopd_lab.kv.cache import KVCache, KVShape, Memory
from nanopd_lab.model.batch import on_device
from nanopd_lab.model.compilation import compile_model
from nanopd_lab.model.inference import optimise
from nanopd_lab.model.loading import LoadedModel, load_model
from nanopd_lab.model.paged import register
from nanopd_lab.model.runner import Launched, ModelRunner
from nanopd_lab.model.startup import capture_graphs, measure_pool

CPU_POOL_BYTES = 1 << 30


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for people: what is queued and running, where the blocks are, what has been done."""

    waiting: int
    running: int
    steps: int
    preemptions: int
    computed_tokens: int
    blocks: AllocatorStats


@dataclass(eq=False)
class _Tracked:
    """A request on its way through the engine."""

    request: Request
    metrics: RequestMetrics
    sequences: dict[int, Sequence] = field(default_factory=dict)  # by sample index
    text: dict[int, Detokenizer] | None = None  # by sample index; None if nobody wants any
    beams: BeamGroup | None = None


class Engine:
    """One model, one KV pool, one batch at a time.

    Args:
        config: see `EngineConfig`
        clock: seconds, for the metrics
        loaded: another engine's model, to share its weights; it must be what `config` asks for
        scheduler: the class that decides what each step computes
        memory: makes the pool's tensor, as `torch.empty` does

    Raises:
        ValueError: unknown or unsupported model, impossible sizes; before anything large is allocated where
            that can be known.
    """

    def __init__(
        self,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        loaded: LoadedModel | None = None,
        scheduler: type[Scheduler] = Scheduler,
        memory: Memory = torch.empty,
    ) -> None:
        self.config = config
        self.clock = clock
        self.device = config.resolve_device()
        with on_device(self.device):
            self._build(loaded, scheduler, memory)

    def _build(self, loaded: LoadedModel | None, scheduler: type[Scheduler], memory: Memory) -> None:
        config = self.config
        dtype = config.resolve_dtype(self.device)
        gpu = self.device.type == "cuda"
        # Everything cheap that can be wrong is found out before the weights are read.
        check_backend(config.attention_backend, self.device)
        fresh = loaded is None
        if loaded is None:
            loaded = load_model(
                config.model,
                dtype=dtype,
                device=self.device,
                seed=config.seed,
                attn_implementation=register(),
            )
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        geometry = loaded.geometry
        if config.max_model_len is not None and config.max_model_len > geometry.max_model_len:
            raise ValueError(
                f"max_model_len is {config.max_model_len}, but {config.model} has only {geometry.max_model_len} "
                "positions; lower it or leave it out"
            )
        model = loaded.model
        if fresh and config.optimise:
            optimise(model)
        shape = KVShape(
            geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, config.block_size, dtype
        )
        backend = config.parts.attention or create_backend(
            config.attention_backend, self.device, shape, geometry.num_heads
        )
        compile_model(model, "off" if config.compilation == "off" else "default")
        self.runner = ModelRunner(
            model, KVCache(shape, 1, self.device), backend, loaded.eos_token_ids, config.seed
        )
        num_blocks = self._count_blocks(shape)
        self.max_model_len = config.max_model_len or min(
            geometry.max_model_len, num_blocks * config.block_size
        )
        self.cache = KVCache(shape, num_blocks, self.device, memory)
        self.runner.use_cache(self.cache)
        if gpu and config.cuda_graphs:
            capture_graphs(self.runner, config, self.max_model_len)
        self.scheduler = scheduler(
            config.parts.allocator(num_blocks, config.enable_prefix_caching),
            block_size=config.block_size,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=self.max_model_len,
            eos_token_ids=loaded.eos_token_ids,
            chunk_policy=config.parts.chunk_policy,
            victim_policy=config.parts.victim_policy,
            block_manager=config.parts.block_manager,
        )
        ahead = gpu if config.async_scheduling is None else config.async_scheduling
        self.loop = StepLoop(self.scheduler, self._launch, ahead)
        self._tracked: dict[str, _Tracked] = {}
        self._computed_tokens = 0

    def _count_blocks(self, shape: KVShape) -> int:
        """Blocks that fit the budget, and no more than every sequence at full length could use."""
        budget = self.config.kv_cache_memory_bytes
        if budget is None:
            budget = CPU_POOL_BYTES
            if self.device.type == "cuda":
                budget = measure_pool(self.runner, shape, self.config)
        num_blocks = budget // shape.block_bytes
        if num_blocks < 1:
            raise ValueError(
                f"kv_cache_memory_bytes is {budget}, but one block of {shape.block_size} tokens takes "
                f"{shape.block_bytes} bytes; raise the budget or lower block_size"
            )
        return num_blocks

    # ------------------------------------------------------------------ requests

    def tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text if there was one, token ids) of a prompt: text, token ids, or vLLM's dict with either.

        Raises:
            InvalidRequestError: neither text nor token ids, ids out of range, or text without a tokenizer.
        """
        return tokenize(prompt, self.tokenizer, self.loaded.geometry.vocab_size, self.config.model)

    def make_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | BeamSearchParams | None = None
    ) -> Request:
        """A checked request, not yet queued.

        Raises:
            InvalidRequestError: see `tokenize` and `Scheduler.validate`.
        """
        text, ids = self.tokenize(prompt)
        beam = params if isinstance(params, BeamSearchParams) else None
        if isinstance(params, BeamSearchParams):
            params = SamplingParams(
                temperature=0.0, max_tokens=params.max_tokens, ignore_eos=True, logprobs=2 * params.beam_width
            )
        params = check_params(params)
        if params.stop_strings and self.tokenizer is None:
            raise InvalidRequestError(
                f"{self.config.model} has no tokenizer; use stop_token_ids instead of stop"
            )
        request = Request(request_id, ids, params, prompt=text, beam=beam)
        self.scheduler.validate(request)
        return request

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | BeamSearchParams | None = None,
        arrival_time: float | None = None,
    ) -> None:
        """Check a request and queue it."""
        self.submit(self.make_request(request_id, prompt, params), arrival_time)

    def submit(self, request: Request, arrival_time: float | None = None) -> None:
        """Queue a request from `make_request`. `arrival_time` (engine clock) defaults to now."""
        request.arrival = self.clock() if arrival_time is None else arrival_time
        sequence = self.scheduler.add(request)
        tracked = _Tracked(request, RequestMetrics(request.arrival))
        tracked.sequences[0] = sequence
        tracked.beams = self.scheduler.beam_group(request.request_id)
        if self.tokenizer is not None and request.params.detokenize and not request.beam:
            tracked.text = {}
        self._tracked[request.request_id] = tracked

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; returns what it has so far, or None if it is unknown or finished."""
        if request_id not in self._tracked:
            return None
        self.scheduler.abort(request_id)
        return self._output(self._tracked[request_id], self.clock())

    @property
    def has_unfinished(self) -> bool:
        """True while any request is waiting or running."""
        return self.scheduler.has_unfinished

    # ------------------------------------------------------------------ the loop

    def step(self, final_only: bool = False) -> list[RequestOutput]:
        """One step; returns the requests that got a token or ended. Empty if there is nothing to do.

        If the model raises, no request is lost: the step's sequences are queued again, and their blocks are
        given back, before the exception goes on to the caller.

        Args:
            final_only: return requests only when they have ended
        """
        done = self.loop.step()
        if done is None:
            if self.loop.under_way is None and self.has_unfinished:
                raise RuntimeError("the chunk policy gives no tokens to any prompt; nothing can run")
            return []
        plan, touched = done
        self._computed_tokens += plan.num_tokens
        now = self.clock()
        progressed: dict[str, _Tracked] = {}
        for sequence in touched:
            tracked = self._tracked[sequence.request.request_id]
            tracked.sequences[sequence.index] = sequence
            if tracked.metrics.first_token_time is None:
                tracked.metrics.first_token_time = now
            # Text takes longer than all else here: it is made when it is looked at, by somebody or for a stop string.
            if tracked.text is not None and (not final_only or sequence.request.params.stop):
                self._read(tracked.text, sequence)
            if not final_only or sequence.finish_reason:
                progressed[sequence.request.request_id] = tracked
        return [
            self._output(tracked, now)
            for tracked in progressed.values()
            if not final_only or all(sequence.finished for sequence in tracked.sequences.values())
        ]

    def _launch(self, plan: StepPlan) -> Launched:
        """Put a plan on the device's queue."""
        now = self.clock()
        for chunk in plan.chunks:
            if not chunk.sequence.tokens_computed:
                metrics = self._tracked[chunk.sequence.request.request_id].metrics
                if metrics.first_scheduled_time is None:
                    metrics.first_scheduled_time = now
        return self.runner.launch(plan)

    def _read(self, text: dict[int, Detokenizer], sequence: Sequence) -> None:
        """Turn what is new of a sample into text and end the sample at a stop string."""
        params = sequence.request.params
        reader = text.get(sequence.index)
        if reader is None:
            reader = text[sequence.index] = Detokenizer(
                self.tokenizer,
                sequence.request.prompt_token_ids,
                params.stop_strings,
                params.include_stop_str_in_output,
                params.min_tokens,
            )
        # A stop token is part of token_ids but not of the text.
        end = sequence.known_len - (sequence.finish_reason == FinishReason.STOP)
        fresh = sequence.tokens[sequence.prompt_len + reader.num_pushed : end]
        stopped = reader.push(*fresh) if fresh else None
        if sequence.finished and sequence.finish_reason != FinishReason.ABORT:
            stopped = stopped or reader.end()
        if stopped:
            if sequence.finished:
                sequence.finish_reason, sequence.stop_reason = FinishReason.STOP, stopped
            else:
                self.scheduler.finish(sequence, FinishReason.STOP, stopped)

    def _output(self, tracked: _Tracked, now: float) -> RequestOutput:
        request, metrics = tracked.request, tracked.metrics
        sequences = [tracked.sequences[index] for index in sorted(tracked.sequences)]
        metrics.num_computed_tokens = sum(s.tokens_computed for s in sequences)
        metrics.num_cached_tokens = sum(s.tokens_cached for s in sequences)
        metrics.num_preemptions = sum(s.preemptions for s in sequences)
        finished = all(sequence.finished for sequence in sequences)
        if finished:
            metrics.finished_time = now
            self._tracked.pop(request.request_id, None)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[self._completion(tracked, sequence) for sequence in sequences],
            finished=finished,
            metrics=metrics,
        )

    def _completion(self, tracked: _Tracked, sequence: Sequence) -> CompletionOutput:
        wants_logprobs = sequence.request.params.logprobs is not None
        if tracked.text is not None:
            self._read(tracked.text, sequence)
        return CompletionOutput(
            index=sequence.index,
            text=tracked.text[sequence.index].text if tracked.text is not None else "",
            token_ids=sequence.output_token_ids,
            cumulative_logprob=sequence.cumulative_logprob if wants_logprobs else None,
            logprobs=spelled(sequence.logprobs, self.tokenizer) if wants_logprobs else None,
            finish_reason=str(sequence.finish_reason) if sequence.finish_reason else None,
            stop_reason=sequence.stop_reason,
            error=sequence.error,
        )

    # ------------------------------------------------------------------ looking after itself

    def stats(self) -> EngineStats:
        """A snapshot of queues, blocks and totals."""
        return EngineStats(
            waiting=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            steps=self.scheduler.num_steps,
            preemptions=self.scheduler.num_preemptions,
            computed_tokens=self._computed_tokens,
            blocks=self.scheduler.allocator.stats(),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if a block or a request has been lost."""
        self.scheduler.check_integrity()
        live = {s.request.request_id for s in (*self.scheduler.waiting, *self.scheduler.running)}
        assert live == set(self._tracked), (
            f"tracked but not live, or the reverse: {live ^ set(self._tracked)}"
        )
