"""Output lengths learnt from requests that end: a hierarchical conjugate Bayesian model of their logarithm.

    length of a request in bucket b:  log x ~ Normal(mean_b, variance_b), rounded to a whole number of tokens
    a bucket (prompts of 2^(b-1) up to 2^b tokens):  mean_b, variance_b ~ NormalInverseGamma(the parent)
    the parent:  what all buckets have in common, estimated from all of them

A bucket with few observations forecasts what the whole does, one with many what it has seen itself; in between the
weight is `strength`, the ratio of the variance within buckets to that between them, which is learnt as well. Where
lengths are not log-normal, `Shape` puts the quantiles right.

Approximated, and otherwise exact: the parent is estimated by moments (empirical Bayes, with its uncertainty added as
Morris 1983 has it), not integrated over; an observation that is cut off is replaced by one of matching moments
(`NormalInverseGamma.beyond`); a whole number counts as its own logarithm; degrees of freedom end at `MOST_DF`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nanopd_lab.cost.files import check_schema
from nanopd_lab.router.lengths import check_observation, check_question
from nanopd_lab.router.predictor.conjugate import Evidence, NormalInverseGamma, StudentT
from nanopd_lab.router.predictor.forecast import BayesianForecast
from nanopd_lab.router.predictor.parent import Parent, Prior
from nanopd_lab.router.predictor.shape import EDGES, Shape
from nanopd_lab.router.predictor.student_t import special_functions

SCHEMA = "nanopd-lab/length-predictor/1"
NUM_BUCKETS = 18  # by the number of bits of the prompt's length: the last from 65,536 tokens on
MOST_DF = 30.0  # log lengths are not so normal that more would be true far out
GOLDEN = (math.sqrt(5) - 1) / 2


class BayesianLengths:
    """The predictor; see the module. No clock, no random numbers: the same events give the same state.

    What all buckets have in common is worked out anew when 1/64 of the observations are new, at first after each.

    Args:
        prior: see `Prior`
        shape: how many observations the belief in log-normal lengths is worth; None: never doubted
        half_life: an observation counts half after so many others; None: as much as a new one for ever

    Raises:
        ValueError: a shape or half-life that is not positive.
    """

    def __init__(
        self, prior: Prior | None = None, shape: float | None = 50.0, half_life: float | None = 1000.0
    ) -> None:
        for name, value in (("shape", shape), ("half_life", half_life)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a positive number of observations, or None")
        special_functions()  # imported now, and not while the first request waits for its route
        self.prior = prior or Prior()
        self.half_life = half_life
        self.buckets = [Evidence() for _ in range(NUM_BUCKETS)]
        self.shape = None if shape is None else Shape(shape)
        self.running: dict[int, Evidence] = {}
        self._bounds: list[float] = []
        self.ended = self.censored = self._new = 0
        self._growth = 1.0 if half_life is None else 2 ** (1 / half_life)
        self._most = math.inf if half_life is None else half_life / math.log(2)
        self._gain = 1.0  # what an observation weighs now: to forget is to let later ones weigh more
        self._refresh()

    # ------------------------------------------------------------------ questions

    def predict(self, prompt_tokens: int, max_tokens: int) -> BayesianForecast:
        """See `LengthPredictor`."""
        check_question(prompt_tokens, max_tokens)
        return BayesianForecast(self._ahead(bucket_of(prompt_tokens)), self.table, max_tokens)

    def belief(self, bucket: int) -> NormalInverseGamma:
        """The posterior of a bucket's mean and variance."""
        parent = self.parent
        prior = NormalInverseGamma(parent.mean, parent.strength, parent.variance, parent.df)
        post = prior.given(self._seen(bucket))
        # The parent's mean is not known exactly, and the bucket leans on it by this share.
        doubt = (parent.strength / post.strength) ** 2 * parent.uncertainty / parent.variance
        spread = 1 + 1 / post.strength + doubt
        worth = 1 / (spread - 1)
        # What comes from the prior's mean has a known spread, so that the sum is nearer to a normal (Satterthwaite).
        df = post.df * (spread / (spread - doubt * parent.from_prior)) ** 2
        return NormalInverseGamma(post.mean, worth, post.variance, df)

    def _seen(self, bucket: int) -> Evidence:
        seen = self.buckets[bucket].times(1 / self._gain)
        return seen.plus(self.running[bucket]) if bucket in self.running else seen

    def _ahead(self, bucket: int) -> StudentT:
        found = self._known.get(bucket)
        if found is None:
            t = self.belief(bucket).predictive
            found = self._known[bucket] = StudentT(min(t.df, MOST_DF), t.mean, t.scale)
        return found

    # ------------------------------------------------------------------ events

    def observe(self, prompt_tokens: int, output_tokens: int, censored: bool = False) -> None:
        """See `LengthPredictor`."""
        check_observation(prompt_tokens, output_tokens, censored)
        bucket = bucket_of(prompt_tokens)
        self._gain *= self._growth
        if self._gain > 1e9:
            self._rescale()
        if self.shape is not None and output_tokens:
            self._place(bucket, output_tokens, censored)
        if not censored:
            self.ended += 1
            self.buckets[bucket].add(math.log(output_tokens), self._gain)
        else:
            self.censored += 1
            worth = self.belief(bucket).beyond(math.log(output_tokens + 0.5)) if output_tokens else None
            if worth is not None:
                value, weight, df = worth
                self.buckets[bucket].add(value, weight * self._gain, df * self._gain)
        self._new += 1
        self._known.clear()
        if self._new * 64 >= min(self.ended + self.censored, self._most):
            self._refresh()

    def survey(self, running: Iterable[tuple[int, int]]) -> None:
        """What is under way: (prompt_tokens, tokens produced so far) of each request; it takes the last one's place.

        Outputs that end are told by `observe`. But the first of many to end are the short ones, and until the others
        end a predictor believes that all are: this tells it of those, which go on. It takes some 10 µs a request, so
        that it is for reports, not for decisions, and is not kept in `to_record`.

        Raises:
            ValueError: a negative number.
        """
        known = []
        for prompt_tokens, produced in running:
            check_observation(prompt_tokens, produced, censored=True)
            if produced:
                known.append((bucket_of(prompt_tokens), math.log(produced + 0.5)))
        self.running, self._bounds = {}, []
        self._refresh()
        for bucket, bound in known:
            worth = self.belief(bucket).beyond(bound)
            if worth is not None:
                self.running.setdefault(bucket, Evidence()).add(*worth)
        self._refresh()
        if self.shape is not None and known:
            self._bounds = [self._ahead(bucket).above(bound) for bucket, bound in known]
            self.table = self.shape.table(self._gain, self._bounds)

    def _place(self, bucket: int, output_tokens: int, censored: bool) -> None:
        """Tell the shape where the forecast had put this length."""
        assert self.shape is not None
        t = self._ahead(bucket)
        above = t.above(math.log(output_tokens + 0.5))
        if not censored:
            # A whole number stands for all lengths that round to it; numbers by the golden ratio fill them evenly
            # (a randomized probability integral transform; Czado, Gneiting & Held 2009).
            upper = t.above(math.log(output_tokens - 0.5)) if output_tokens > 1 else 1.0
            above += (upper - above) * (self.ended * GOLDEN % 1.0)
        self.shape.add(above, self._gain, censored)

    def _refresh(self) -> None:
        gain, self._new = self._gain, 0
        seen = [self._seen(bucket) for bucket in range(NUM_BUCKETS)]
        self.parent = Parent.of(self.prior, [each for each in seen if each.weight])
        self.table = EDGES if self.shape is None else self.shape.table(gain, self._bounds)
        self._known: dict[int, StudentT] = {}

    def _rescale(self) -> None:
        self.buckets = [each.times(1 / self._gain) for each in self.buckets]
        if self.shape is not None:
            self.shape.scale(1 / self._gain)
        self._gain = 1.0

    # ------------------------------------------------------------------ for people and files

    def stats(self) -> dict[str, Any]:
        """What it has seen and believes, in tokens: of the whole, and of each bucket that has seen anything."""
        buckets = []
        for number, seen in enumerate(self.buckets):
            if seen.weight:
                t = self._ahead(number)
                buckets.append({
                    "prompt_tokens": [1 << number >> 1, None if number == NUM_BUCKETS - 1 else (1 << number) - 1],
                    "observations": seen.weight / self._gain,
                    "own_median": math.exp(seen.mean),
                    "median": math.exp(t.mean),
                    "spread": math.exp(t.scale),
                })  # fmt: skip
        parent = {**self.parent._asdict(), "median": math.exp(self.parent.mean)}
        return {"ended": self.ended, "censored": self.censored, "parent": parent, "buckets": buckets}

    def to_record(self) -> dict[str, Any]:
        """The whole state, JSON-ready: what `from_record` makes of it goes on in the same way."""
        shape = self.shape
        return {
            "schema": SCHEMA,
            "prior": self.prior._asdict(),
            "half_life": self.half_life,
            "ended": self.ended,
            "censored": self.censored,
            "new": self._new,
            "gain": self._gain,
            "buckets": [[each.weight, each.mean, each.df, each.squares] for each in self.buckets],
            "shape": None if shape is None else {"strength": shape.strength, **shape.to_record()},
            "parent": self.parent._asdict(),
            "table": self.table,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any], name: str = "the record") -> BayesianLengths:
        """What `to_record` made.

        Raises:
            ValueError: another schema version, a missing field or one that can't be; the message begins with `name`.
        """
        check_schema(record, SCHEMA, name, "start a new predictor, and save it again")
        try:
            shape = record["shape"]
            found = cls(Prior(**record["prior"]), shape and shape["strength"], record["half_life"])
            found.ended, found.censored, found._new = (int(record[k]) for k in ("ended", "censored", "new"))
            found._gain = float(record["gain"])
            if not 1 <= found._gain < math.inf:
                raise ValueError(f"gain is {found._gain}; it must be at least 1")
            found.buckets = [Evidence(*map(float, each)) for each in record["buckets"]]
            if len(found.buckets) != NUM_BUCKETS:
                raise ValueError(f"{len(found.buckets)} buckets; there are {NUM_BUCKETS}")
            for each in found.buckets:
                if not (math.isfinite(each.mean) and min(each.weight, each.df, each.squares) >= 0):
                    raise ValueError(f"a bucket's evidence is {each}; only the mean may be negative")
            if found.shape is not None:
                found.shape.load(shape)
            found.parent = Parent(**record["parent"])
            if not all(0 < each < math.inf for each in found.parent[1:]):
                raise ValueError(f"the parent is {found.parent}; only its mean may be negative")
            found.table = [float(each) for each in record["table"]]
            if len(found.table) != len(EDGES):
                raise ValueError(f"a table of {len(found.table)} numbers; it has {len(EDGES)}")
        except KeyError as error:
            raise ValueError(f"{name}: {error.args[0]!r} is missing") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        return found


def bucket_of(prompt_tokens: int) -> int:
    """Prompts of one bucket differ by less than a factor of 2."""
    return min(int(prompt_tokens).bit_length(), NUM_BUCKETS - 1)
