"""nanoPD's own cost model, kept as the baseline that the iteration model is compared with.

    T_collocated    = α·L + out·t_decode(max(load, 1)) + γ·L·min(load, threshold)/threshold
    T_disaggregated = α·L + bytes_per_token·L/bandwidth + out·t_decode(decode_batch + 1)
    t_decode(B)     = β·max(1, B/threshold)

It prices a request, not a step: no intercept, no attention term, no queue, and decode steps that do not depend on
their context. Formulas and parameters were read in nanoPD's source. Times are in seconds, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from nanopd_lab.cost.fitting import fit_terms
from nanopd_lab.cost.grid import Point
from nanopd_lab.cost.roofline import ChunkShape

THRESHOLDS = (1, 4, 8, 16, 32)  # what nanoPD chooses from
QWEN3_8B_KV_BYTES_PER_TOKEN = 147_456


@dataclass(frozen=True)
class NanoPDModel:
    """One device's parameters.

    alpha_s:             prefill, seconds a prompt token
    beta_s:              a decode step of at most `threshold` sequences, seconds
    threshold:           batch from which on a decode step grows in proportion
    gamma_s:             interference, seconds a prompt token when the worker decodes `threshold` or more
    bytes_per_s:         of the link between a prefill and a decode worker
    kv_bytes_per_token:  of the model

    Raises:
        ValueError: a parameter that is not positive (`gamma_s` may be 0).
    """

    alpha_s: float
    beta_s: float
    threshold: int
    gamma_s: float
    bytes_per_s: float
    kv_bytes_per_token: int = QWEN3_8B_KV_BYTES_PER_TOKEN

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "gamma_s"):
                raise ValueError(f"{name} is {value}; it must be positive")

    @classmethod
    def fit(
        cls, timed: Seq[tuple[Point, float]], kv_bytes_per_token: int = QWEN3_8B_KV_BYTES_PER_TOKEN
    ) -> NanoPDModel:
        """To timed steps, as well as the formulas can: α from whole prompts, β and threshold from decode steps.

        Of decode steps those of at most max(THRESHOLDS) sequences. No interference (which is for requests, not for
        steps), and a link that takes no time.

        Raises:
            ValueError: no whole prompt or no decode step among them.
        """
        prompts = [(p.tokens, s) for p, s in timed if p.kind == "prefill" and p.chunks[0].past == 0]
        most = max(THRESHOLDS)
        decodes = [(p.tokens, s) for p, s in timed if p.kind == "decode" and p.tokens <= most]
        if not prompts or not decodes:
            raise ValueError(f"{len(prompts)} whole prompts and {len(decodes)} decode steps; both are needed")

        def one_term(rows: Iterable[tuple[float, float]]) -> tuple[float, float]:
            """(squared relative errors, coefficient)"""
            term, seconds = np.array(list(rows), dtype=float).T
            found = float(fit_terms(term[:, None], seconds)[0])
            return float(((term * found / seconds - 1) ** 2).sum()), found

        (_, beta), threshold = min(
            (one_term((max(1.0, batch / each), s) for batch, s in decodes), each) for each in THRESHOLDS
        )
        return cls(one_term(prompts)[1], beta, threshold, 0.0, float("inf"), kv_bytes_per_token)

    def step_seconds(self, chunks: Iterable[ChunkShape]) -> float:
        """What the formulas make of one step: α for each token of a prompt, and a decode step of the others."""
        chunks = list(chunks)
        batch = sum(chunk.count == 1 and chunk.past > 0 for chunk in chunks)
        prompt = sum(chunk.count for chunk in chunks) - batch
        return self.prefill_seconds(prompt) + (self.decode_seconds(batch) if batch else 0.0)

    @property
    def transfer_rate_s(self) -> float:
        """Seconds that the KV of one token takes on the link."""
        return self.kv_bytes_per_token / self.bytes_per_s

    @property
    def gamma_over_transfer_rate(self) -> float:
        """How much dearer it is to prefill a token beside a full decode batch than to move its KV."""
        return self.gamma_s / self.transfer_rate_s

    def prefill_seconds(self, prompt_tokens: int) -> float:
        """Of a prompt alone on its worker."""
        return self.alpha_s * prompt_tokens

    def decode_seconds(self, batch: int) -> float:
        """Of one decode step."""
        return self.beta_s * max(1.0, batch / self.threshold)

    def interference_seconds(self, prompt_tokens: int, load: int) -> float:
        """What a prompt costs more where `load` sequences decode; 0 at load 0."""
        return self.gamma_s * prompt_tokens * min(load, self.threshold) / self.threshold

    def collocated_seconds(self, prompt_tokens: int, output_tokens: int, load: int) -> float:
        """One request, prefilled and decoded by a worker that runs `load` others."""
        return (
            self.prefill_seconds(prompt_tokens)
            + output_tokens * self.decode_seconds(max(load, 1))
            + self.interference_seconds(prompt_tokens, load)
        )

    def disaggregated_seconds(self, prompt_tokens: int, output_tokens: int, decode_batch: int = 0) -> float:
        """One request, prefilled by an idle worker and decoded by one that runs `decode_batch` others."""
        return (
            self.prefill_seconds(prompt_tokens)
            + self.transfer_rate_s * prompt_tokens
            + output_tokens * self.decode_seconds(decode_batch + 1)
        )

    def prefers_disaggregated(
        self, prompt_tokens: int, output_tokens: int, load: int, decode_batch: int = 0
    ) -> bool:
        """nanoPD's decision: the smaller of the two, collocated if they are equal."""
        return self.disaggregated_seconds(
            prompt_tokens, output_tokens, decode_batch
        ) < self.collocated_seconds(prompt_tokens, output_tokens, load)


def published(device: str) -> NanoPDModel:
    """The parameters that nanoPD ships for Qwen3-8B on "rtx-4090" and "h20".

    Raises:
        ValueError: another device.
    """
    known = {
        "rtx-4090": NanoPDModel(0.1247e-3, 51.56e-3, 16, 0.0869e-3, 12.9e9),
        "h20": NanoPDModel(0.1452e-3, 33.10e-3, 16, 0.1302e-3, 392e9),
    }
    if device not in known:
        raise ValueError(f"nanoPD published no parameters for {device!r}; it did for {', '.join(known)}")
    return known[device]
