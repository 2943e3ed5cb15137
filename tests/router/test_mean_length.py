"""Mean lengths while outputs are under way: SciPy's log-normal on the same grid, and lengths that were planted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from scipy.stats import norm

from nanopd_lab.router.mean_length import LOGS, PRIOR, PRIOR_SIGMA, SIGMAS, MeanLength, MeanLengths


def believed(ended: list[int], under_way: int, sample: list[float]) -> tuple[float, float]:
    """(posterior mean of the logarithm of the median, mean length) of one kind, nothing forgotten."""
    places, spreads = np.meshgrid(LOGS, list(SIGMAS), indexing="ij")
    score = norm.logpdf(places, PRIOR, PRIOR_SIGMA) + np.log(list(SIGMAS.values()))
    for tokens in ended:
        score += norm.logpdf(np.log(tokens), places, spreads)
    for tokens in sample:
        score += under_way / len(sample) / 2 * norm.logsf(np.log(tokens + 1), places, spreads)
    shares = np.exp(score - logsumexp(score))
    log_median = float((shares * places).sum())
    return log_median, float(np.exp(log_median + (shares * spreads**2).sum() / 2))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 3000), max_size=6),
    st.integers(1, 60),
    st.lists(st.floats(0, 900), min_size=1, max_size=8),
)
def test_it_is_scipys_log_normal(ended: list[int], under_way: int, sample: list[float]) -> None:
    """Ends forget one in 300, which six of them hardly notice."""
    kind = MeanLength()
    for tokens in ended:
        kind.ended(tokens)
    kind.look(under_way, sample)
    log_median, mean = believed(ended, under_way, sample)
    assert kind.log_median == pytest.approx(log_median, abs=0.05)
    plain = len(ended) / (len(ended) + under_way + 1)
    tokens = sum(ended) + under_way * sum(sample) / len(sample)
    wanted = mean if not ended else (1 - plain) * mean + plain * tokens / len(ended)
    assert kind.mean == pytest.approx(wanted, rel=0.06)


@pytest.mark.parametrize("seed", range(6))
def test_outputs_that_are_all_alike_are_seen_to_be(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty of 280 tokens with a spread of 0.3, begun 4 tokens apart, of which the first few have ended."""
    rng = np.random.default_rng(seed)
    lengths = 268 * np.exp(0.3 * rng.standard_normal(60))
    produced = 300.0 - 4 * np.arange(60)

    def mean() -> float:
        kind = MeanLength()
        for length in lengths[lengths <= produced]:
            kind.ended(round(length))
        under_way = np.sort(produced[lengths > produced])
        kind.look(len(under_way), under_way[3::6].tolist())
        return kind.mean

    found = mean()
    monkeypatch.setattr("nanopd_lab.router.mean_length.SIGMAS", {0.8: 1.0})
    assert 280 / 1.6 < found < min(280 * 1.6, 0.95 * mean()), (
        "a spread that is known to be wide sees more to come"
    )


def test_the_shorter_mean_of_those_that_have_ended_is_not_believed() -> None:
    """Outputs of 20 to 2,000 tokens; after 60 tokens those that have ended had 35 on average."""
    rng = np.random.default_rng(1)
    lengths = 200 * np.exp(1.0 * rng.standard_normal(200))
    kind = MeanLength()
    for length in lengths[lengths <= 60]:
        kind.ended(max(1, round(length)))
    under_way = int((lengths > 60).sum())
    kind.look(under_way, [60.0] * 8)
    assert lengths.mean() / 2 < kind.mean < 2 * lengths.mean()


def test_a_kind_that_has_not_been_seen_is_as_the_others() -> None:
    lengths = MeanLengths()
    before = lengths.look(9, 0, [])
    for _ in range(40):
        lengths.ended(5, 1000)
    lengths.look(5, 0, [])
    lengths.all.look(0, [])
    assert lengths.look(9, 0, []) > 2 * before
