"""The planner's formulas: theory where it exists, hand computation, and what must never get worse."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.cost.hardware import load_model
from nanopd_lab.cost.iteration import IterationModel
from nanopd_lab.cost.transfer_time import TransferModel
from nanopd_lab.router import Outlook, Slo
from nanopd_lab.router.layouts import Layout, Workload, layouts
from nanopd_lab.router.plan import Planner

H100 = load_model("h100-qwen3-8b")
LINEAR = IterationModel(0.005, 0.0, 2e-5, 0.0, 5e-8, 0.0)


def outlook(slo: Slo, iteration: IterationModel = H100.iteration, speed: float = 366e9) -> Outlook:
    return Outlook(iteration, slo, TransferModel(6e-5, 0.0, speed), 2_359_296, 16, 2048)


def planner(slo: Slo, prompt: int = 1024, output: int = 128, **options: float) -> Planner:
    return Planner(outlook(slo, **options), Workload((prompt,), (output,)), num_blocks=20_000)  # type: ignore[arg-type]


# ---- theory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("load", "ttft_ms"), [(0.3, 87.6), (0.5, 108.3), (0.7, 156.3), (0.9, 397.0)])
def test_ttft_of_one_prefill_worker_is_md1(load: float, ttft_ms: float) -> None:
    """REFERENCES, section 2: DistServe's fit of OPT-13B, 512 tokens, which fill a step so that none is shared."""
    model = load_model("a100-opt-13b-distserve").iteration
    found = Planner(replace(outlook(Slo(), model), max_num_batched_tokens=512), Workload((512,), (1,)))
    step = found.times.beside(0).alone[0]
    assert step == pytest.approx(72.1e-3, rel=2e-3)
    assert found.forecast(Layout(1, 1), load / step).ttft_s == pytest.approx(ttft_ms / 1e3, rel=3e-3)


def test_batch_is_littles_law() -> None:
    """t(B) = a + b·B and λk = B/t(B) have the solution B = λk·a/(1 - λk·b)."""
    found = Planner(outlook(Slo(), LINEAR), Workload((1000,), (101,)), max_num_seqs=1000)
    context = found.times.context
    assert context == pytest.approx(1000 + 1 + 50)
    slope = 2e-5 + 5e-8 * (context + 1)
    rate = 60.0
    forecast = found.forecast(Layout(20, 1), rate)
    assert forecast.batch == pytest.approx(rate * 100 * 0.005 / (1 - rate * 100 * slope), rel=0.01)


def test_prefill_stretches_steps_of_mixed_workers() -> None:
    """τ = t(B)/(1 - u) with B = λkτ: by hand for a linear model; a prompt takes its tokens' time from others."""
    found = Planner(outlook(Slo(), LINEAR), Workload((1000,), (101,)), max_num_seqs=1000)
    rate, gaps = 12.0, 100
    # A step for itself takes 5 ms, but those that decode would have made one anyway; K and V are read once more.
    taken = rate * (1000 * 2e-5 + 1000 * 5e-8)
    slope = 2e-5 + 5e-8 * (found.times.context + 1)
    forecast = found.forecast(Layout(mixed=1), rate)
    batch = rate * gaps * 0.005 / (1 - taken - rate * gaps * slope)
    assert forecast.batch == pytest.approx(batch, rel=0.02)
    assert forecast.tpot_s == pytest.approx((0.005 + slope * (batch + 1)) / (1 - taken), rel=0.02)


def test_a_slow_link_is_the_limit_and_says_so() -> None:
    """302 MB a request over 1 GB/s: 3.3 requests/s a card."""
    found = planner(Slo(5.0, 1.0), 2048, 64, speed=1e9)
    assert found.ceiling(Layout(2, 2)) == pytest.approx(2 / (128.5 * 2_359_296 / 1e9), rel=1e-6)
    assert found.capacity(Layout(2, 2)).rate < found.ceiling(Layout(2, 2))
    over = found.forecast(Layout(2, 2), 1.01 * found.ceiling(Layout(2, 2)))
    assert over.limit == "link"
    assert over.attainment == 0


def test_places_are_a_limit() -> None:
    few = Planner(outlook(Slo(5.0, 1.0)), Workload((1024,), (512,)), max_num_seqs=8)
    many = Planner(outlook(Slo(5.0, 1.0)), Workload((1024,), (512,)), max_num_seqs=256)
    assert few.capacity(Layout(mixed=1)).limit == "KV room"
    assert few.capacity(Layout(mixed=1)).batch < 8
    assert many.capacity(Layout(mixed=1)).rate > 3 * few.capacity(Layout(mixed=1)).rate
    tight = Planner(outlook(Slo(5.0, 1.0)), Workload((1024,), (512,)), max_num_seqs=256, num_blocks=800)
    assert tight.times.places == pytest.approx(10, rel=0.05)  # 800 blocks hold ten of 1,280 tokens


def test_the_regimes_of_the_literature() -> None:
    """Time to spare between tokens: mixed workers; none: disaggregated ones (Zhong et al., OSDI 2024; DESIGN)."""
    easy_tpot = planner(Slo(0.3, 0.05), 256, 256).rank(layouts(8))
    tight_tpot = planner(Slo(1.0, 0.01)).rank(layouts(8))
    assert easy_tpot[0].layout == Layout(mixed=8)
    assert tight_tpot[0].layout.mixed == 0
    assert tight_tpot[0].rate > 1.3 * next(each.rate for each in tight_tpot if each.layout.mixed)


# ---- what never gets worse -------------------------------------------------------------------------------

SLOS = st.builds(
    Slo, st.floats(0.05, 3.0), st.floats(0.007, 0.1), st.one_of(st.just(math.inf), st.floats(1.0, 30.0))
)
LENGTHS = st.lists(st.integers(2, 6000), min_size=1, max_size=6)
ROUNDING = 0.01  # of the search for a capacity, and of batches between those of the tables


@st.composite
def cases(draw: st.DrawFn) -> tuple[Outlook, Workload]:
    speed = draw(st.sampled_from([1e9, 1e10, 4e11]))
    workload = Workload.of(draw(LENGTHS), [1 + each // 4 for each in draw(LENGTHS)])
    return outlook(draw(SLOS), speed=speed), workload


@settings(max_examples=25, deadline=None)
@given(cases(), st.integers(1, 4), st.integers(1, 4))
def test_more_workers_never_serve_less(case: tuple[Outlook, Workload], one: int, two: int) -> None:
    found = Planner(*case, num_blocks=20_000)
    for small, large in (
        (Layout(one, two), Layout(one + 1, two)),
        (Layout(one, two), Layout(one, two + 1)),
        (Layout(mixed=one), Layout(mixed=one + 1)),
    ):
        assert found.capacity(large).rate >= found.capacity(small).rate * (1 - ROUNDING)


@settings(max_examples=25, deadline=None)
@given(cases(), SLOS, st.integers(1, 8))
def test_a_tighter_promise_never_serves_more(
    case: tuple[Outlook, Workload], other: Slo, workers: int
) -> None:
    told, workload = case
    tighter = Slo(*(min(pair) for pair in zip(told.slo, other, strict=True)))
    loose, tight = Planner(told, workload), Planner(replace(told, slo=tighter), workload)
    for layout in layouts(workers):
        assert tight.capacity(layout).rate <= loose.capacity(layout).rate * (1 + ROUNDING)


@settings(max_examples=25, deadline=None)
@given(cases(), st.floats(1e8, 1e12))
def test_a_slower_link_never_serves_more(case: tuple[Outlook, Workload], speed: float) -> None:
    told, workload = case
    assert told.transfer is not None
    slower = TransferModel(told.transfer.setup_s, 0.0, min(speed, told.transfer.bytes_per_s))
    quick, slow = Planner(told, workload), Planner(replace(told, transfer=slower), workload)
    for layout in layouts(4):
        assert slow.capacity(layout).rate <= quick.capacity(layout).rate * (1 + ROUNDING)
    assert slow.capacity(Layout(mixed=4)) == quick.capacity(Layout(mixed=4))


@settings(max_examples=25, deadline=None)
@given(cases(), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_more_requests_never_get_more_of_what_they_were_promised(
    case: tuple[Outlook, Workload], one: float, two: float
) -> None:
    found = Planner(*case)
    for layout in layouts(3):
        rates = sorted((one, two))
        few, many = (found.forecast(layout, part * found.ceiling(layout)).attainment for part in rates)
        assert 0 <= many <= few + 1e-2
        assert few <= 1


@settings(max_examples=10, deadline=None)
@given(cases(), st.integers(20, 40))
def test_a_search_finds_what_looking_at_all_finds(case: tuple[Outlook, Workload], workers: int) -> None:
    found = Planner(*case, num_blocks=20_000)
    best, searched = found.rank(layouts(workers))[0], found.search(workers, most=16)
    assert len(searched) < workers
    assert searched[0].rate >= best.rate * (1 - ROUNDING)


# ---- small things ----------------------------------------------------------------------------------------


def test_strata_keep_the_mean_and_the_order() -> None:
    lengths = [float(1 + (i * 7919) % 1000) for i in range(1000)]
    found = Workload.of(lengths, [5] * 9)
    assert len(found.prompts) == 32
    assert found.outputs == (5,)
    assert list(found.prompts) == sorted(found.prompts)
    assert sum(found.prompts) / 32 == pytest.approx(sum(lengths) / 1000, rel=1e-9)


def test_unloaded_times_are_those_of_a_request_alone() -> None:
    found = Planner(outlook(Slo()), Workload.of(range(100, 1100, 100), [2]), share=0.9)
    ttft, tpot = found.unloaded()
    assert ttft == found.times.beside(0).alone[8]  # nine of ten are no longer
    assert tpot == found.times.decode_step_s(1)


def test_a_promise_that_cannot_be_kept_has_capacity_0() -> None:
    assert planner(Slo(1.0, 0.004)).capacity(Layout(mixed=8)).rate == 0
    assert planner(Slo(0.02, 0.1)).capacity(Layout(4, 4)).rate == 0


def test_outputs_of_one_token_have_no_decode() -> None:
    found = planner(Slo(0.3, 0.01), output=1).capacity(Layout(mixed=2))
    assert found.rate > 50
    assert found.batch == 0
    assert found.tpot_s == 0


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="is no layout"):
        planner(Slo()).forecast(Layout(2, 0), 1.0)
    with pytest.raises(ValueError, match="is no layout"):
        planner(Slo()).capacity(Layout(1, 1, 1))
    with pytest.raises(ValueError, match="must be positive"):
        planner(Slo()).forecast(Layout(1, 1), 0.0)
    with pytest.raises(ValueError, match=r"0\.9, not 90"):
        Planner(outlook(Slo()), Workload((1,), (1,)), share=90)
    with pytest.raises(ValueError, match="at least 1 token"):
        Workload.of([], [1])


def test_importing_it_needs_neither_torch_nor_the_simulator() -> None:
    code = (
        "import sys, nanopd_lab.router.plan\n"
        "print([name for name in sys.modules if name == 'torch' or name.startswith('nanopd_lab.sim')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
