"""What a request is promised: service level objectives, and whether it got them.

Goodput counts the requests that meet all objectives given, as `vllm bench serve --goodput` does (DistServe, Zhong et
al., OSDI 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

NAMES = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}


class Slo(NamedTuple):
    """Seconds that must not be exceeded; infinite: no objective.

    ttft_s: from arrival to the first token; tpot_s: per token after the first; e2e_s: from arrival to the last token
    """

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    e2e_s: float = math.inf

    @classmethod
    def parse(cls, items: Iterable[str]) -> Slo:
        """From `ttft:500 tpot:100` in ms, one text or several, as vLLM's `--goodput`; `e2el` is the third name.

        Raises:
            ValueError: an unknown or repeated name, or a number of ms that is not positive and finite.
        """
        found: dict[str, float] = {}
        for item in items.split() if isinstance(items, str) else items:
            name, _, value = item.partition(":")
            if name not in NAMES or not value:
                raise ValueError(f"goodput {item!r}; write ttft:500, tpot:100 or e2el:5000, in ms")
            if NAMES[name] in found:
                raise ValueError(f"goodput {item!r}: {name} is given twice; give each objective once")
            try:
                milliseconds = float(value)
            except ValueError:
                milliseconds = math.nan
            if not 0 < milliseconds < math.inf:
                raise ValueError(f"goodput {item!r}: {value!r} is no positive number of ms; write {name}:500")
            found[NAMES[name]] = milliseconds / 1e3
        return cls(**found)

    @property
    def given(self) -> bool:
        """True if there is any objective."""
        return min(self) < math.inf

    def met(self, ttft_s: float, tpot_s: float, e2e_s: float) -> bool:
        """True if a request with these times got all it was promised; tpot_s is 0 for one token (vLLM's rule)."""
        return ttft_s <= self.ttft_s and tpot_s <= self.tpot_s and e2e_s <= self.e2e_s

    def __str__(self) -> str:
        given = {name: getattr(self, field) for name, field in NAMES.items()}
        return " ".join(f"{name}:{1e3 * value:g}" for name, value in given.items() if value < math.inf)
