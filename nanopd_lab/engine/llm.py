"""`LLM`: the offline interface, in vLLM's shape."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanopd_lab.core import BeamSearchParams, FinishReason, Request, SamplingParams
from nanopd_lab.engine.beam import BeamGroup
from nanopd_lab.engine.config import EngineConfig, EngineParts
from nanopd_lab.engine.engine import Engine, EngineStats
from nanopd_lab.engine.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from nanopd_lab.engine.prompts import (
    Messages,
    Prompt,
    as_batch,
    as_conversations,
    check_params,
    params_for,
    render_chat,
)
from nanopd_lab.errors import InvalidRequestError, NonFiniteLogitsError

# What the weights in memory depend on.
WEIGHT_SETTINGS = frozenset({"model", "dtype", "device", "seed", "optimise"})


class LLM:
    """A model that answers prompts, many at a time.

        llm = LLM("smollm2")
        outputs = llm.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0))
        print(outputs[0].outputs[0].text)

    Args:
        model: "smollm2" (embedded), a folder, a GGUF file, a hub id, or "random:<shape>"
        parts: a learner's own parts (`lab.parts()`), or None for the package's
        others: the fields of `EngineConfig`, of the same name
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        block_size: int = 16,
        max_num_batched_tokens: int = 512,
        max_num_seqs: int = 64,
        max_model_len: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        seed: int = 0,
        device: str = "auto",
        attention_backend: str = "auto",
        optimise: bool = True,
        gpu_memory_utilization: float = 0.9,
        compilation: str = "off",
        cuda_graphs: bool = True,
        cuda_graph_sizes: tuple[int, ...] | None = None,
        async_scheduling: bool | None = None,
        parts: EngineParts | None = None,
    ) -> None:
        self.engine = Engine(
            EngineConfig(
                model=model,
                dtype=str(dtype).removeprefix("torch."),
                block_size=block_size,
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                enable_prefix_caching=enable_prefix_caching,
                seed=seed,
                device=device,
                attention_backend=attention_backend,
                optimise=optimise,
                gpu_memory_utilization=gpu_memory_utilization,
                compilation=compilation,
                cuda_graphs=cuda_graphs,
                cuda_graph_sizes=cuda_graph_sizes,
                async_scheduling=async_scheduling,
                parts=parts or EngineParts(),
            )
        )
        self._start()

    def _start(self) -> None:
        self._numbers = itertools.count()
        self._live: set[str] = set()
        self._missed: dict[str, list[RequestOutput]] = {}  # of live requests, while others stepped the engine

    def reconfigured(self, **changes: Any) -> LLM:
        """Another engine on the same weights, with a scheduler and a KV pool of its own and some settings changed.

        Takes no time and no memory for weights: for comparing settings.

        Raises:
            ValueError: a setting that does not exist, that the weights depend on, or that is out of range.
        """
        config = self.engine.config
        names = {field.name for field in fields(config)}
        if wrong := sorted(set(changes) - names | set(changes) & WEIGHT_SETTINGS):
            free = ", ".join(sorted(names - WEIGHT_SETTINGS))
            raise ValueError(f"{wrong[0]} cannot be changed on loaded weights; these can: {free}")
        other = LLM.__new__(LLM)
        other.engine = Engine(replace(config, **changes), loaded=self.engine.loaded)
        other._start()
        return other

    @property
    def model_path(self) -> Path | None:
        """The local folder it was loaded from, in Hugging Face's layout; None for random weights."""
        return self.engine.loaded.path

    def get_tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, or None."""
        return self.engine.tokenizer

    def stats(self) -> EngineStats:
        """Queues, blocks and totals."""
        return self.engine.stats()

    # ------------------------------------------------------------------ generating

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; outputs are in the order of the prompts.

        Args:
            prompts: one prompt or many; each a string, a list of token ids, or a dict with
                `prompt` or `prompt_token_ids`
            sampling_params: one for all, or one for each

        Raises:
            InvalidRequestError: a prompt cannot be served; it is named, and none has been started
            NonFiniteLogitsError: the model produced NaN or infinity
        """
        batch = as_batch(prompts)
        each = params_for(batch, sampling_params)
        ids = self._submit(self._checked(batch, each))
        outputs = {output.request_id: output for output in self._run(ids, use_tqdm, final_only=True)}
        for number, request_id in enumerate(ids):
            for sample in outputs[request_id].outputs:
                if sample.finish_reason == FinishReason.ERROR.value:
                    raise NonFiniteLogitsError(
                        f"prompt {number}: {sample.error} after {len(sample.token_ids)} tokens; "
                        "check the weights, or load them in a wider dtype"
                    )
        return [outputs[request_id] for request_id in ids]

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Yield the growing output after every token. Leaving the loop early aborts the request.

        Streams may be read in turns, and `generate` called between: each steps the engine for all that run.
        """
        requests = self._checked([prompt], [check_params(sampling_params)])

        def read() -> Iterator[RequestOutput]:
            yield from self._run(self._submit(requests), use_tqdm=False)

        return read()

    def chat(
        self,
        messages: Messages | Seq[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each a list of `{"role": …, "content": …}`."""
        prompts = [
            self.render_chat(conversation, add_generation_prompt, chat_template)
            for conversation in as_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def render_chat(
        self, messages: Messages, add_generation_prompt: bool = True, chat_template: str | None = None
    ) -> dict[str, Any]:
        """The prompt that the model's chat template makes of a conversation: its text and token ids."""
        return render_chat(
            messages, self.get_tokenizer(), self.engine.config.model, add_generation_prompt, chat_template
        )

    def beam_search(
        self, prompts: Prompt | Seq[Prompt], params: BeamSearchParams, use_tqdm: bool = True
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best continuations of each prompt that beam search finds, best first."""
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequestError(
                f"params is {params!r}; give BeamSearchParams, as BeamSearchParams(beam_width=4, max_tokens=64)"
            )
        batch = as_batch(prompts)
        ids = self._submit(self._checked(batch, [params] * len(batch)))
        groups: dict[str, BeamGroup] = {}
        for request_id in ids:
            group = self.engine.scheduler.beam_group(request_id)
            assert group is not None
            groups[request_id] = group
        outputs = {output.request_id: output for output in self._run(ids, use_tqdm, final_only=True)}
        return [self._beams(outputs[request_id], groups[request_id]) for request_id in ids]

    def _beams(self, output: RequestOutput, group: BeamGroup) -> BeamSearchOutput:
        prompt = output.prompt_token_ids
        beams = [
            BeamSearchSequence(list(beam.tokens), "", beam.cumulative_logprob, list(beam.logprobs))
            for beam in group.finished
        ]
        for sample in output.outputs:
            if sample.finish_reason == FinishReason.ERROR.value:
                raise NonFiniteLogitsError(f"beam search: {sample.error}")
            if sample.finish_reason == FinishReason.LENGTH.value:
                total = sample.cumulative_logprob or 0.0
                beams.append(
                    BeamSearchSequence([*prompt, *sample.token_ids], "", total, sample.logprobs or [])
                )
        beams.sort(key=lambda beam: group.score(beam.tokens, beam.cum_logprob), reverse=True)
        best = beams[: group.params.beam_width]
        tokenizer = self.get_tokenizer()
        for beam in best:
            if tokenizer is not None:
                beam.text = tokenizer.decode(beam.tokens, skip_special_tokens=True)
        return BeamSearchOutput(best)

    # ------------------------------------------------------------------ driving the engine

    def _checked(self, prompts: Seq[Prompt], params: Seq[SamplingParams | BeamSearchParams]) -> list[Request]:
        requests = []
        for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self.engine.make_request(f"llm-{next(self._numbers)}", prompt, each))
            except InvalidRequestError as error:
                raise InvalidRequestError(
                    f"prompt {number}: {error}" if len(prompts) > 1 else str(error)
                ) from None
        return requests

    def _submit(self, requests: Seq[Request]) -> list[str]:
        for request in requests:
            self.engine.submit(request)
        return [request.request_id for request in requests]

    def _run(self, ids: Seq[str], use_tqdm: bool, final_only: bool = False) -> Iterator[RequestOutput]:
        """Step the engine until all of `ids` have finished; whatever ends the loop early aborts them."""
        pending = set(ids)
        self._live |= pending
        bar = tqdm(
            total=len(ids), desc="Processed prompts", unit="prompt", disable=not use_tqdm, dynamic_ncols=True
        )
        try:
            while pending:
                missed = [each for name in pending & self._missed.keys() for each in self._missed.pop(name)]
                for output in missed or self.engine.step(final_only):
                    if output.request_id not in pending:
                        if output.request_id in self._live:
                            self._missed.setdefault(output.request_id, []).append(output)
                        continue
                    if output.finished:
                        pending.discard(output.request_id)
                        bar.update()
                    yield output
        finally:
            bar.close()
            self._live.difference_update(ids)
            for request_id in pending:
                self.engine.abort(request_id)
                self._missed.pop(request_id, None)
