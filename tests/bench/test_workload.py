"""Workloads: what is sent and when, drawn from one seed or read from files as they are published."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopd_lab.bench.texts import sharegpt_workload
from nanopd_lab.bench.workload import (
    NAMED,
    Fixed,
    Mixed,
    Uniform,
    Workload,
    random_workload,
    trace_workload,
)
from nanopd_lab.bench.workload_cli import add_workload_options, workload_of
from nanopd_lab.sim.arrivals import Arrivals, RampUp
from nanopd_lab.sim.workload import SimRequest

LENGTHS = Fixed(10), Fixed(5)


def encode(text: str) -> list[int]:
    """A token a word."""
    return [len(word) for word in text.split()]


@given(
    st.integers(1, 50),
    st.floats(0.01, 1e3),
    st.one_of(st.floats(0.05, 50), st.just(math.inf)),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_arrivals_end_at_count_over_rate(count: int, rate: float, burstiness: float, seed: int) -> None:
    times = Arrivals(rate, burstiness).times(count, random.Random(seed))
    assert times == sorted(times)
    assert len(times) == count
    assert times[-1] == pytest.approx(count / rate)
    assert times == Arrivals(rate, burstiness).times(count, random.Random(seed))


def test_constant_gaps_and_all_at_once() -> None:
    assert Arrivals(4.0, math.inf).times(3, random.Random(0)) == pytest.approx([0.25, 0.5, 0.75])
    assert Arrivals().times(3, random.Random(0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("strategy", ["linear", "exponential"])
def test_a_ramp_goes_from_one_rate_to_the_other(strategy: str) -> None:
    """The gaps, smoothed, against the rates that vLLM's formula gives for the same places."""
    count, ramp = 40_000, RampUp(strategy, 2.0, 32.0)
    times = [0.0, *Arrivals(math.inf, 1.0, ramp).times(count, random.Random(1))]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    for place in (0.1, 0.5, 0.9):
        rate = 2.0 + 30.0 * place if strategy == "linear" else 2.0 * 16.0**place
        middle = round(place * count)
        assert 1 / statistics.fmean(gaps[middle - 1000 : middle + 1000]) == pytest.approx(rate, rel=0.1)


def test_nanopds_mixture_is_short_or_long_with_nothing_between() -> None:
    rng = random.Random(0)
    drawn = [NAMED["mixed"][0].draw(rng) for _ in range(2000)]
    short = [each for each in drawn if 64 <= each <= 256]
    assert len(short) == pytest.approx(1000, abs=100)
    assert all(1024 <= each <= 2048 for each in drawn if each not in set(short))
    assert {NAMED[name][1].draw(rng) for name in ("short", "long", "mixed")} == {128}


def test_lengths_around_a_mean_are_uniform() -> None:
    assert Uniform.around(100, 0.2) == Uniform(80, 120)
    assert Uniform.around(7, 0.0) == Uniform(7, 7)
    with pytest.raises(ValueError, match=r"it must lie in \[0, 1\)"):
        Uniform.around(100, 1.0)
    assert Mixed((Fixed(3),)).draw(random.Random(0)) == 3


def test_tokens_are_random_but_for_what_is_shared() -> None:
    workload = random_workload(8, Arrivals(), LENGTHS, 5, prefix_tokens=6, num_prefixes=2)
    prompts = workload.tokens(50_000)
    assert [len(each) for each in prompts] == [16] * 8
    assert prompts == workload.tokens(50_000)
    assert all(0 <= token < 50_000 for prompt in prompts for token in prompt)
    heads = {each.prefix: tuple(prompt[:6]) for each, prompt in zip(workload.requests, prompts, strict=True)}
    assert len(set(heads.values())) == 2
    for each, prompt in zip(workload.requests, prompts, strict=True):
        assert tuple(prompt[:6]) == heads[each.prefix]
    assert len({tuple(prompt[6:]) for prompt in prompts}) == 8
    assert random_workload(8, Arrivals(), LENGTHS, 6, prefix_tokens=6).tokens(50_000)[0] != prompts[0]


def test_a_mooncake_trace_shares_what_its_hashes_say(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 7, "hash_ids": [3, 4, 5]},
        {"timestamp": 3000, "input_length": 1030, "output_length": 7, "hash_ids": [3, 4, 6]},
        {"timestamp": 6000, "input_length": 600, "output_length": 7, "hash_ids": [9]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    workload = trace_workload(path, "mooncake", speed=2.0)
    assert [each.arrival for each in workload.requests] == [0.0, 1.5, 3.0]
    assert workload.request_rate == 1.0
    for one, two, three in (
        workload.tokens(90_000),
        [each.prompt(number) for number, each in enumerate(workload.requests)],
    ):
        assert [len(one), len(two), len(three)] == [1100, 1030, 600]
        assert one[:1024] == two[:1024]
        assert one[1024:1030] != two[1024:]
        assert not set(three) & set(one[:512]) or three[:512] != one[:512]
        assert three[512:] != one[512:600]
    assert {"file", "sha256", "speed"} == set(workload.source)
    other = trace_workload(path, count=2, arrivals=Arrivals(4.0, math.inf))
    assert [each.arrival for each in other.requests] == pytest.approx([0.25, 0.5])


def conversations(count: int) -> list[dict[str, object]]:
    return [
        {"id": str(n), "conversations": [{"from": "human", "value": "a " * n}, {"value": "bb " * (n + 1)}]}
        for n in range(count)
    ]


def test_sharegpt_is_chosen_as_vllm_does(tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    entries = [*conversations(1300), {"conversations": [{"value": "one turn only"}]}]
    path.write_text(json.dumps(entries, indent=1))
    workload = sharegpt_workload(path, encode, 900, Arrivals(3.0), seed=2)
    lengths = [(each.prompt_tokens, each.output_tokens) for each in workload.requests]
    assert len(set(lengths)) == 900
    assert all(4 <= prompt <= 1023 and output == prompt + 1 for prompt, output in lengths)
    assert lengths != sorted(lengths)
    assert workload.tokens(10) == [[1] * prompt for prompt, _ in lengths]
    assert not workload.ignore_eos
    fixed = sharegpt_workload(path, encode, 900, Arrivals(), output_tokens=2)
    assert {each.output_tokens for each in fixed.requests} == {2}
    with pytest.raises(ValueError, match=r"sharegpt\.json has 1020 conversations of fit length, and 1100"):
        sharegpt_workload(path, encode, 1100, Arrivals())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n {"conversations": []},\n {"conversations": [1, 2]}\n]', "line 3: no conversation"),
        ('[\n\n {"turns": []}]', "line 3: no conversation"),
        ('[\n {"conversations": [],}\n]', "line 2: no JSON"),
        ('[\n {"conversations": []}\n {"conversations": []}]', "line 3: no JSON: ',' or"),
        ('{"conversations": []}', "line 1: no JSON: a list of conversations"),
        ("", "line 1: no JSON"),
        ("[]", "has 0 conversations"),
    ],
)
def test_a_broken_sharegpt_file_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"talk\.json.*" + words):
        sharegpt_workload(path, encode, 1, Arrivals())


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_workload_options(parser)
    return parser.parse_args(["--num-prompts", "12", *flags])


def test_flags_make_the_workload_and_a_sweep_changes_rate_and_seed() -> None:
    args = parse("--random-input-len", "50", "--random-range-ratio", "0.5", "--burstiness", "2")
    assert workload_of(args).request_rate == math.inf
    workload = workload_of(args, rate=3.0, seed=7)
    assert (workload.request_rate, workload.seed) == (3.0, 7)
    assert all(25 <= each.prompt_tokens <= 75 for each in workload.requests)
    assert len({each.prompt_tokens for each in workload.requests}) > 3
    for name in ("log-normal", "short", "mixed", "azure-like", "prefix_repetition"):
        assert len(workload_of(parse("--dataset-name", name)).requests) == 12
    ramp = workload_of(
        parse(
            "--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "9", "--no-ignore-eos"
        )
    )  # fmt: skip
    assert 1 < ramp.request_rate < 9
    assert not ramp.ignore_eos


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset-name", "azure"], "--dataset-path"),
        (["--dataset-path", "x.csv"], "leave --dataset-path out"),
        (["--random-input-len", "0"], "0 tokens"),
        (["--burstiness", "0"], "burstiness is 0; it must be positive"),
        (["--request-rate", "-1"], "rate is -1 requests/s; it must be positive"),
        (["--ramp-up-strategy", "linear"], "needs --ramp-up-start-rps"),
        (["--ramp-up-start-rps", "1"], "need --ramp-up-strategy"),
        (
            ["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "3", "--ramp-up-end-rps", "1"],
            "no lower than the start",
        ),
        (["--num-prompts", "0"], "at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_explained(flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        workload_of(parse(*flags))


def test_what_is_no_workload_is_refused() -> None:
    one, two = SimRequest("a", 1.0, 3, 3), SimRequest("b", 0.0, 3, 3)
    for requests, words in (
        ((), "at least one"),
        ((one, two), "not in order"),
        ((two, two), "same request_id"),
    ):
        with pytest.raises(ValueError, match=words):
            Workload(requests, "x")
    with pytest.raises(ValueError, match="2 prompts for 1 requests"):
        Workload((one,), "x", prompts=([1], [2]))
    with pytest.raises(ValueError, match="hash ids"):
        SimRequest("a", 0.0, 3, 3, hash_ids=(-1,))
