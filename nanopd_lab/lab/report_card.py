"""What a learner's engine amounts to: each figure beside the package's own, and beside a peer that nobody here wrote.

    card = ReportCard()
    card.add("decode step, 8 sequences", "ms", yours=61.0, package=60.2, peer=("Hugging Face", 150.0))
    card                                        # a table; `viz.report_card.card_view(card)` draws it

`step_times` measures the lines that need a clock.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from nanopd_lab.lab.text import Table

if TYPE_CHECKING:
    import torch

    from nanopd_lab.engine.llm import LLM

LEVEL = 0.1  # figures that differ by less are called level: runs of the same code do


class Line(NamedTuple):
    """One figure of three systems.

    peer: its name and its figure; None: there is none to ask
    more: more of it is better
    """

    what: str
    unit: str
    yours: float
    package: float
    peer: tuple[str, float] | None = None
    more: bool = False

    def times_as_good(self, value: float) -> float:
        """Of a figure, beside the package's: 2 is twice as good, whichever way that is. Zeros are equally good."""
        good, base = (value, self.package) if self.more else (self.package, value)
        if good == base:
            return 1.0
        return good / base if base else float("inf")

    @property
    def verdict(self) -> str:
        """Yours beside the package's, in words."""
        ratio = self.times_as_good(self.yours)
        if abs(ratio - 1) < LEVEL:
            return "level"
        if ratio > 1:
            return f"{ratio:.1f} times as good" if ratio >= 2 else f"{ratio - 1:.0%} better"
        return f"{1 / ratio:.1f} times worse" if ratio <= 0.5 else f"{1 / ratio - 1:.0%} worse"


@dataclass
class ReportCard:
    """Lines in the order in which they were added; shows itself as a table."""

    lines: list[Line] = field(default_factory=list)

    def add(
        self,
        what: str,
        unit: str,
        *,
        yours: float,
        package: float,
        peer: tuple[str, float] | None = None,
        more: bool = False,
    ) -> None:
        """See `Line`.

        Raises:
            ValueError: a figure is negative or not a number.
        """
        for name, value in (("yours", yours), ("package", package), ("peer", peer[1] if peer else 0.0)):
            if not value >= 0:
                raise ValueError(f"{what}: {name} is {value}; figures are at least 0")
        self.lines.append(Line(what, unit, yours, package, peer, more))

    @property
    def table(self) -> Table:
        """For people."""
        rows = tuple(
            (
                f"{line.what}, {line.unit}",
                _number(line.yours),
                _number(line.package),
                f"{_number(line.peer[1])} ({line.peer[0]})" if line.peer else "",
                line.verdict,
            )
            for line in self.lines
        )
        return Table(("", "yours", "the package's", "beside them", "yours is"), rows)

    def __str__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    __repr__ = __str__


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class StepSize(NamedTuple):
    """A step of one kind: `batch` sequences with `past` tokens each, which get `new` ones."""

    name: str
    batch: int
    past: int
    new: int


def step_times(
    engines: Mapping[str, LLM], model: Any, sizes: Seq[StepSize], rounds: int = 3, repeats: int = 3
) -> dict[str, dict[str, float]]:
    """Median seconds of steps, by name of the system and then of the step. The systems take turns, so that a slow
    moment of the machine hits all of them.

    Args:
        engines: by name; idle, and what their pools hold is lost
        model: a Hugging Face model, which is called with its own KV cache; under the name "Hugging Face"
    """
    from nanopd_lab.cost.grid import Point
    from nanopd_lab.cost.profile import StepTimer
    from nanopd_lab.cost.roofline import ChunkShape

    timers = {name: StepTimer(llm.engine) for name, llm in engines.items()}
    found: dict[str, dict[str, list[float]]] = {
        name: {size.name: [] for size in sizes} for name in [*engines, "Hugging Face"]
    }
    for _ in range(rounds):
        for size in sizes:
            kind = "decode" if size.new == 1 else "prefill"
            point = Point(kind, (ChunkShape(size.new, size.past),) * size.batch)
            theirs = hugging_face_step(model, size)
            for name, timer in timers.items():
                found[name][size.name].append(timer.seconds(point, repeats))
            found["Hugging Face"][size.name].append(statistics.median(theirs() for _ in range(repeats)))
    return {
        name: {size: statistics.median(times) for size, times in each.items()} for name, each in found.items()
    }


def hugging_face_step(model: Any, size: StepSize) -> Callable[[], float]:
    """A function that runs such a step through Hugging Face's code, as often as it is called; it returns seconds."""
    import torch
    from transformers import DynamicCache

    ids = _some_ids(size.batch, size.past + size.new, model.config.vocab_size).to(model.device)

    def forward(some: torch.Tensor, cache: DynamicCache) -> None:
        with torch.inference_mode():
            logits = model(some, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        logits.argmax(-1).tolist()  # waits for a GPU

    known = DynamicCache(config=model.config)
    if size.past:
        forward(ids[:, : size.past], known)

    def step() -> float:
        cache = copy.deepcopy(known)  # a step adds to it
        begun = time.perf_counter()
        forward(ids[:, size.past :], cache)
        return time.perf_counter() - begun

    return step


def served_per_s(
    engines: Mapping[str, LLM], model: Any, requests: Seq[tuple[list[int], int]], rounds: int = 2
) -> dict[str, float]:
    """Output tokens a second, by name of the system, of requests that come together; the best of so many rounds.

    Hugging Face's `generate` gets them as one batch: prompts padded to the longest on the left, and as many tokens for
    everybody as the longest answer has. Only tokens that were asked for count.

    Args:
        engines, model: as of `step_times`
        requests: prompt and number of tokens to generate, greedily and to the end
    """
    from nanopd_lab.bench.offline import hf_padded
    from nanopd_lab.core import SamplingParams

    prompts = [prompt for prompt, _ in requests]
    wanted = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for _, count in requests
    ]
    runs: dict[str, Callable[[], object]] = {
        name: lambda llm=llm: llm.generate(prompts, wanted, use_tqdm=False)  # type: ignore[misc]
        for name, llm in engines.items()
    }
    padded = hf_padded(model)
    runs["Hugging Face"] = lambda: padded(prompts, max(count for _, count in requests))
    seconds = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
    tokens = sum(count for _, count in requests)
    return {name: tokens / each for name, each in seconds.items()}


def _some_ids(batch: int, length: int, vocab: int) -> torch.Tensor:
    import torch

    return (torch.arange(batch * length).reshape(batch, length) * 13 + 7) % vocab
