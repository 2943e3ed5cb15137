"""Server-sent events: a request's outputs as they grow, in OpenAI's chunks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.core import SamplingParams
from nanopd_lab.engine.prompts import Prompt
from nanopd_lab.serve.bridge import Bridge
from nanopd_lab.serve.replies import Reply, error_body
from nanopd_lab.serve.schema import StreamOptions


async def events_of(
    bridge: Bridge,
    reply: Reply,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    options: StreamOptions,
) -> AsyncIterator[str]:
    """Server-sent events of all prompts' samples as they grow; the last is `[DONE]`."""
    queue: asyncio.Queue[tuple[int, ClusterOutput | Exception | None]] = asyncio.Queue()

    async def read(number: int, prompt: Prompt) -> None:
        try:
            async with aclosing(bridge.outputs(prompt, params)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    queue.put_nowait((number, output))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    readers = [asyncio.create_task(read(number, prompt)) for number, prompt in enumerate(prompts)]
    latest: dict[int, ClusterOutput] = {}
    seen: dict[int, tuple[int, int, bool]] = {}  # of a choice: characters and tokens that went out, ended
    begun, reading = False, len(prompts)
    try:
        while reading:
            number, found = await queue.get()
            if found is None:
                reading -= 1
                continue
            if isinstance(found, Exception):
                if not begun:
                    raise found
                yield event_of(error_body(str(found), "server_error", 500))
                return
            if reply.chat and not begun:
                for index in range(params.n):
                    yield event_of(reply.first(index))
            begun = True
            latest[number] = found
            for sample in found.outputs:
                choice = number * params.n + sample.index
                characters, tokens, ended = seen.get(choice, (0, 0, False))
                if sample.error:
                    yield event_of(error_body(sample.error, "server_error", 500))
                    return
                text, new = sample.text[characters:], len(sample.token_ids) > tokens
                if ended or not (text or sample.finished or (new and sample.logprobs is not None)):
                    continue  # tokens that make no text yet
                so_far = latest.values() if options.include_usage and options.continuous_usage_stats else None
                yield event_of(reply.more(choice, sample, text, tokens, so_far))
                seen[choice] = len(sample.text), len(sample.token_ids), sample.finished
        if options.include_usage:
            yield event_of(reply.totals([latest[number] for number in sorted(latest)]))
        yield "data: [DONE]\n\n"
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def following(first: str, events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The rest behind the first; closed with it, so that a client's going cancels its requests."""
    async with aclosing(events):  # type: ignore[type-var]
        yield first
        async for event in events:
            yield event


def event_of(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
