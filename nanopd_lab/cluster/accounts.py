"""What became of a request, in tokens, bytes and seconds: so that "disaggregated" can never silently mean "not"."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanopd_lab.cluster.messages import Usage
from nanopd_lab.core import Route


@dataclass(slots=True)
class AttemptReport:
    """One try at one sample, over one route. Times are the controller's, `None` where it did not come so far.

    known_tokens: prompt and output tokens that it started from; new_tokens: output tokens that it brought
    prefill, decode: what the two workers did; for a collocated route one worker does both and `decode` is None
    failure: why it was given up
    """

    route: Route
    started: float
    known_tokens: int
    new_tokens: int = 0
    first_token: float | None = None
    received: float | None = None
    ended: float | None = None
    failure: str | None = None
    prefill: Usage | None = None
    decode: Usage | None = None
    whole: bool = False  # ended by the worker itself, not cut short by the caller

    @property
    def prefill_queue_s(self) -> float | None:
        """From when it was sent to a worker until its first chunk was planned."""
        if self.prefill is None or self.prefill.scheduled is None:
            return None
        return self.prefill.scheduled - self.started

    @property
    def prefill_s(self) -> float | None:
        """From the first chunk's plan to the first token."""
        usage = self.prefill
        if usage is None or usage.scheduled is None or usage.sampled is None:
            return None
        return usage.sampled - usage.scheduled

    @property
    def transfer_s(self) -> float:
        """Time during which at least one pull was under way."""
        return self._pulling(float("inf"))

    @property
    def transfer_hidden_s(self) -> float:
        """What of `transfer_s` cost the request nothing: the source was still computing."""
        sampled = self.prefill.sampled if self.prefill else None
        return self._pulling(float("-inf") if sampled is None else sampled)

    def _pulling(self, end_s: float) -> float:
        if self.decode is None:
            return 0.0
        total, until = 0.0, float("-inf")
        for begin, end in sorted(self.decode.pulls):
            total += max(0.0, min(end, end_s) - max(begin, until))
            until = max(until, end)
        return total

    @property
    def transfer_visible_s(self) -> float | None:
        """What the request waits for its KV: from the first token until the target goes on."""
        if self.decode is None or self.decode.adopted is None:
            return None
        sampled = self.prefill.sampled if self.prefill else None
        return self.decode.adopted - (sampled if sampled is not None else self.decode.adopted)

    def problems(self) -> list[str]:
        """What doesn't add up; empty if all does, or if a worker died with its part of the accounts."""
        found: list[str] = []

        def expect(name: str, value: int, wanted: int) -> None:
            if value != wanted:
                found.append(f"{self.route}: {name} is {value}, not {wanted}")

        source, target = self.prefill, self.decode
        if self.failure is not None or not self.whole or source is None:
            return found
        if self.route.collocated:
            if not source.preemptions:
                expect(
                    "computed + cached",
                    source.computed + source.cached,
                    self.known_tokens + self.new_tokens - 1,
                )
            expect("received", source.received, 0)
            return found
        if not source.preemptions:
            expect("prefill's computed + cached", source.computed + source.cached, self.known_tokens)
        if target is not None and self.received is not None:
            expect("received + cached there", target.received + target.first_cached, self.known_tokens)
            if not target.preemptions:
                expect("decode's computed", target.computed, self.new_tokens - 1)
        return found


@dataclass(slots=True)
class PathReport:
    """The accounts of one sample. `complete` once every worker that took part has reported or is gone."""

    prompt_tokens: int
    arrival: float
    attempts: list[AttemptReport] = field(default_factory=list)
    output_tokens: int = 0
    finished: float | None = None
    complete: bool = False

    @property
    def last(self) -> AttemptReport | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def route(self) -> Route | None:
        """The route that brought the last token, None if it never got one."""
        return self.last.route if self.last else None

    @property
    def transferred_tokens(self) -> int:
        """Tokens whose KV was pulled from another worker, over all attempts."""
        return sum(a.decode.received for a in self.attempts if a.decode)

    @property
    def transferred_bytes(self) -> int:
        return sum(a.decode.received_bytes for a in self.attempts if a.decode)

    @property
    def computed_tokens(self) -> int:
        return sum(u.computed for a in self.attempts for u in (a.prefill, a.decode) if u)

    @property
    def cached_tokens(self) -> int:
        return sum(u.cached for a in self.attempts for u in (a.prefill, a.decode) if u)

    @property
    def queue_s(self) -> float | None:
        """From arrival until the (last) attempt was sent to a worker."""
        return self.last.started - self.arrival if self.last else None

    @property
    def prefill_queue_s(self) -> float | None:
        """As of the last attempt, like all that follow."""
        return self.last.prefill_queue_s if self.last else None

    @property
    def prefill_s(self) -> float | None:
        return self.last.prefill_s if self.last else None

    @property
    def transfer_s(self) -> float:
        return self.last.transfer_s if self.last else 0.0

    @property
    def transfer_hidden_s(self) -> float:
        return self.last.transfer_hidden_s if self.last else 0.0

    @property
    def transfer_visible_s(self) -> float | None:
        return self.last.transfer_visible_s if self.last else None

    @property
    def decode_s(self) -> float | None:
        """From the first token, or from the hand-over, to the last."""
        if self.finished is None or self.last is None or self.last.first_token is None:
            return None
        return self.finished - (self.last.received or self.last.first_token)

    def problems(self) -> list[str]:
        """What doesn't add up, over all attempts."""
        return [problem for attempt in self.attempts for problem in attempt.problems()]
