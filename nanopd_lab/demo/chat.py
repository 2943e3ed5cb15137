"""Several people ask at once: one engine answers (`nanopd-lab chat`), or a cluster of them."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING

from nanopd_lab.core import SamplingParams
from nanopd_lab.demo import load_prompts
from nanopd_lab.engine.llm import LLM
from nanopd_lab.engine.outputs import RequestOutput

if TYPE_CHECKING:
    from nanopd_lab.cluster.cluster import Cluster


def run_chat(llm: LLM, max_tokens: int = 48) -> None:
    """Answer the prompts in `data/prompts.json` concurrently; print answers and what the engine did."""
    prompts = load_prompts()
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    print(
        f"{len(prompts)} conversations at once on {engine.config.model} ({engine.config.dtype}, {engine.device})\n"
    )
    start = engine.clock()
    before = engine.stats().computed_tokens
    for number, prompt in enumerate(prompts):
        engine.add_request(f"chat-{number}", llm.render_chat([{"role": "user", "content": prompt}]), params)
    finished: list[RequestOutput] = []
    peak_running = 0
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished:
                finished.append(output)
                _show(prompts[int(output.request_id.removeprefix("chat-"))], output)
        peak_running = max(peak_running, engine.stats().running)
    seconds = engine.clock() - start

    stats = engine.stats()
    output_tokens = sum(len(output.outputs[0].token_ids) for output in finished)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in finished)
    cached = sum(output.num_cached_tokens for output in finished)
    ttfts = [output.metrics.ttft or 0.0 for output in finished]
    tpots = [t for output in finished if (t := output.metrics.tpot(len(output.outputs[0].token_ids)))]
    blocks = stats.blocks
    print(f"{output_tokens} tokens in {seconds:.2f} s: {output_tokens / seconds:.1f} tokens/s")
    print(
        f"time to first token   mean {statistics.mean(ttfts) * 1e3:6.0f} ms, worst {max(ttfts) * 1e3:.0f} ms"
    )
    print(
        f"time per output token mean {statistics.mean(tpots) * 1e3:6.1f} ms, worst {max(tpots) * 1e3:.1f} ms"
    )
    print(f"prompts               {prompt_tokens} tokens, {cached} of them from the prefix cache")
    computed = stats.computed_tokens - before
    print(
        f"steps                 {stats.steps}, {computed} tokens computed, up to {peak_running} sequences a step"
    )
    print(
        f"KV blocks             {blocks.peak_used} of {blocks.num_blocks} used at the peak, {blocks.used} now, "
        f"{blocks.evictable} kept for re-use"
    )


def _show(prompt: str, output: RequestOutput) -> None:
    sample = output.outputs[0]
    asked = textwrap.shorten(prompt, 90, placeholder=" …")
    answer = textwrap.fill(" ".join(sample.text.split()), 96, initial_indent="  ", subsequent_indent="  ")
    print(f"> {asked}\n{answer}\n  [{len(sample.token_ids)} tokens, {sample.finish_reason}]\n")


def ask(cluster: Cluster, say: Callable[[str], None], count: int = 3, max_tokens: int = 24) -> None:
    """A few of the questions at once, through the workers: so that it is seen that a model answers. A model without a
    tokenizer has nothing to say."""
    if cluster.tokenizer is None:
        return
    questions = sorted(load_prompts(), key=len)[:count]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    conversations = [[{"role": "user", "content": each}] for each in questions]
    for question, output in zip(questions, cluster.chat(conversations, params, use_tqdm=False), strict=True):
        route = output.paths[0].route if output.paths else "?"
        answer = textwrap.shorten(output.outputs[0].text, 90, placeholder=" …")
        say(f"  > {question}\n    {answer}  [{route}]")
