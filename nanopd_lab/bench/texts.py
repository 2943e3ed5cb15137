"""Workloads with words: conversations in ShareGPT's format, and the prompts that come with the package."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nanopd_lab.bench.workload import Workload, at_times, source_of
from nanopd_lab.resources import data_dir
from nanopd_lab.sim.arrivals import Arrivals
from nanopd_lab.sim.workload import SimRequest

Encode = Callable[[str], Sequence[int]]
FEWEST_TOKENS = 4  # of prompt and output; shorter ones are left out, as by vLLM, like what is too long
MOST_PROMPT_TOKENS, MOST_TOKENS = 1024, 2048


class TooFewConversationsError(ValueError):
    """A file has fewer that are fit than are asked for; the message begins with `told`."""

    def __init__(self, path: Path, fit: int, count: int) -> None:
        self.fit = fit
        self.told = f"{path.name} has {fit} conversations of fit length, and {count} are asked for"
        super().__init__(f"{self.told}; lower num-prompts")


def sharegpt_workload(
    path: Path,
    encode: Encode,
    count: int,
    arrivals: Arrivals,
    seed: int = 0,
    output_tokens: int | None = None,
) -> Workload:
    """The first question of `count` conversations in random order, with an answer as long as the first one there.

    Conversations are chosen as `vllm bench serve` does: of two turns or more, prompt and answer at least 4 tokens, at
    most 1,024 and 2,048 with the answer.

    Args:
        path: a JSON list of `{"conversations": [{"value": …}, …]}`
        encode: from a text to its tokens
        output_tokens: of each answer instead; then its own may have any length

    Raises:
        FileNotFoundError: there is no such file.
        TooFewConversationsError: fewer than `count` conversations are fit.
        ValueError: the file is not of this format (named with the line).
    """
    pairs = [pair for pair in map(_turns, itertools.repeat(path.name), *_entries(path)) if pair is not None]
    random.Random(seed).shuffle(pairs)
    chosen: list[tuple[Sequence[int], int]] = []
    for question, answer in pairs:
        if len(chosen) == count:
            break
        prompt = encode(question)
        output = len(encode(answer)) if output_tokens is None else output_tokens
        if (
            FEWEST_TOKENS <= len(prompt) <= MOST_PROMPT_TOKENS
            and (output_tokens is not None or output >= FEWEST_TOKENS)
            and len(prompt) + output <= MOST_TOKENS
        ):
            chosen.append((prompt, output))
    if len(chosen) < count:
        raise TooFewConversationsError(path, len(chosen), count)
    return _workload(chosen, "sharegpt", arrivals, seed, source_of(path))


def prompts_workload(
    encode_chat: Encode, count: int, arrivals: Arrivals, seed: int = 0, output_tokens: int = 64
) -> Workload:
    """The questions in `data/prompts.json`, again and again until there are `count`."""
    questions = json.loads((data_dir() / "prompts.json").read_text())["chat"]
    prompts = [encode_chat(question) for question in questions]
    chosen = [(prompt, output_tokens) for prompt in itertools.islice(itertools.cycle(prompts), count)]
    return _workload(chosen, "prompts", arrivals, seed, {"file": "prompts.json"})


def _workload(
    chosen: Sequence[tuple[Sequence[int], int]],
    name: str,
    arrivals: Arrivals,
    seed: int,
    source: dict[str, Any],
) -> Workload:
    requests = [
        SimRequest(f"r{number}", 0.0, len(prompt), output) for number, (prompt, output) in enumerate(chosen)
    ]
    prompts = tuple(prompt for prompt, _ in chosen)
    return Workload(
        tuple(at_times(requests, arrivals, seed)),
        name,
        arrivals,
        seed,
        prompts,
        ignore_eos=False,
        source=source,
    )


def _entries(path: Path) -> tuple[list[int], list[Any]]:
    """(line, value) of every element of a JSON list, as two lists."""
    lines, values = [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
        for line, value in _elements(text):
            lines.append(line)
            values.append(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name}, line {error.lineno}: no JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: no UTF-8 at byte {error.start}") from None
    return lines, values


def _elements(text: str) -> Iterator[tuple[int, Any]]:
    decoder, place, line = json.JSONDecoder(), 0, 1

    def skip() -> str:
        """Over white space; returns what is next, empty at the end."""
        nonlocal place, line
        while place < len(text) and text[place].isspace():
            line += text[place] == "\n"
            place += 1
        return text[place : place + 1]

    if skip() != "[":
        raise json.JSONDecodeError("a list of conversations is expected", text, place)
    place += 1
    if skip() == "]":
        return
    while True:
        skip()
        value, end = decoder.raw_decode(text, place)
        yield line, value
        line += text.count("\n", place, end)
        place = end
        if (mark := skip()) == "]":
            return
        if mark != ",":
            raise json.JSONDecodeError("',' or ']' is expected", text, place)
        place += 1


def _turns(file: str, line: int, entry: Any) -> tuple[str, str] | None:
    """Question and answer; None if it has fewer than two turns."""
    try:
        turns = entry["conversations"]
        if len(turns) < 2:
            return None
        found = turns[0]["value"], turns[1]["value"]
    except (KeyError, TypeError, IndexError):
        found = (None, None)
    if not all(isinstance(each, str) for each in found):
        raise ValueError(
            f'{file}, line {line}: no conversation; write {{"conversations": [{{"value": "…"}}, {{"value": "…"}}]}}'
        )
    return found
