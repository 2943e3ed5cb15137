"""How long an output will be, as routing policies ask it: a protocol, so that a policy works with any predictor.

A predictor is a pure state machine without a clock: a forecast is a question, `observe` an event. Lengths are tokens.
"""

from __future__ import annotations

from typing import Protocol


class LengthForecast(Protocol):
    """The output length of one request, as far as it was known when the forecast was made.

    The length is a whole number in `1..max_tokens`, and so is every quantile; means lie between the two.
    """

    @property
    def mean(self) -> float:
        """Expected output tokens."""
        ...

    def quantile(self, p: float) -> float:
        """The smallest length that the output does not exceed with a probability of `p` or more.

        Raises:
            ValueError: `p` is not within 0..1.
        """
        ...

    def remaining_mean(self, produced: int) -> float:
        """Expected tokens still to come, given that `produced` are there and the output has not ended.

        Within `1..max_tokens - produced`; 0 when `produced` has reached max_tokens.

        Raises:
            ValueError: `produced` is negative.
        """
        ...

    def remaining_quantile(self, produced: int, p: float) -> float:
        """`quantile` of the tokens still to come, given that `produced` are there and the output has not ended.

        Raises:
            ValueError: as `quantile` and `remaining_mean`.
        """
        ...


class LengthPredictor(Protocol):
    """Learns output lengths from requests that end."""

    def predict(self, prompt_tokens: int, max_tokens: int) -> LengthForecast:
        """A forecast for a request with such a prompt, which may produce `max_tokens` at most.

        It is a snapshot: what is observed later does not change it.

        Raises:
            ValueError: `prompt_tokens` is negative or `max_tokens` is not positive.
        """
        ...

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        """An output has ended after `output_tokens`.

        Args:
            censored: it would have gone on: cancelled, cut by max_tokens, or still running

        Raises:
            ValueError: `prompt_tokens` or `output_tokens` is negative, or an output that is not censored is empty.
        """
        ...


def check_question(prompt_tokens: int, max_tokens: int) -> None:
    """Raises the ValueErrors of `LengthPredictor.predict`."""
    if prompt_tokens < 0:
        raise ValueError(f"prompt_tokens is {prompt_tokens}; it must be 0 or more")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")


def check_remaining(produced: int, p: float = 0.0) -> None:
    """Raises the ValueErrors of `LengthForecast.remaining_quantile`."""
    if produced < 0:
        raise ValueError(f"produced is {produced} tokens; it must be 0 or more")
    if not 0 <= p <= 1:
        raise ValueError(f"quantile {p} of an output length; p must lie in 0..1 (0.9, not 90)")


def check_observation(prompt_tokens: int, output_tokens: int, censored: bool) -> None:
    """Raises the ValueErrors of `LengthPredictor.observe`."""
    if prompt_tokens < 0:
        raise ValueError(f"prompt_tokens is {prompt_tokens}; it must be 0 or more")
    if output_tokens < (0 if censored else 1):
        raise ValueError(
            f"an output of {output_tokens} tokens has ended; that is at least 1 token "
            "(or 0 if censored=True: it was cut off)"
        )
