"""Flags that describe a workload, named as those of `vllm bench serve`; `bench`, `sweep` and `simulate` have them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanopd_lab.bench.workload import Workload
    from nanopd_lab.sim.arrivals import Arrivals
    from nanopd_lab.sim.workload import Sizes

SYNTHETIC = ("random", "prefix_repetition", "log-normal", "short", "long", "mixed", "azure-like")
TRACES = ("azure", "mooncake", "burstgpt", "trace")
TEXTS = ("sharegpt", "prompts")


def add_workload_options(
    parser: argparse.ArgumentParser, num_prompts: int = 1000, rates: bool = True, rate: float = math.inf
) -> None:
    """Add the flags.

    Args:
        num_prompts, rate: defaults; a trace's own times go before the rate's
        rates: with those that say when requests come, and the seed
    """
    parser.add_argument(
        "--dataset-name",
        choices=(*SYNTHETIC, *TRACES, *TEXTS),
        default="random",
        help="lengths: random (see --random-*), log-normal, nanoPD's short, long and mixed, azure-like; traces and "
        "sharegpt are read from --dataset-path; prompts come with the package (default random)",
    )
    parser.add_argument("--dataset-path", type=Path, help="the file of a trace, or of sharegpt")
    parser.add_argument("--num-prompts", type=int, default=num_prompts, help=f"default {num_prompts}")
    if rates:
        parser.add_argument(
            "--request-rate",
            type=float,
            help=f"requests a second; inf: all at once. Default: a trace's own times, else {rate:g}",
        )
        parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(default_rate=rate)
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="of gamma gaps: 1 is Poisson, less burstier, inf constant",
    )
    parser.add_argument("--ramp-up-strategy", choices=("linear", "exponential"), help="let the rate rise")
    parser.add_argument("--ramp-up-start-rps", type=float, help="from this rate")
    parser.add_argument("--ramp-up-end-rps", type=float, help="to this one")
    parser.add_argument("--trace-speed", type=float, default=1.0, help="play a trace so many times as fast")
    for name, default, text in (
        ("--random-input-len", 1024, "tokens of each prompt of `random`"),
        ("--random-output-len", 128, "and of each output"),
        ("--random-prefix-len", 0, "tokens in front of them that all prompts share"),
        ("--prefix-repetition-prefix-len", 256, "tokens that prompts of `prefix_repetition` share"),
        ("--prefix-repetition-suffix-len", 256, "tokens of their own behind them"),
        ("--prefix-repetition-output-len", 128, "and of each output"),
        ("--prefix-repetition-num-prefixes", 10, "how many different ones there are"),
        ("--input-median", 120, "tokens of `log-normal` prompts"),
        ("--output-median", 24, "and of their outputs"),
        ("--prompts-output-len", 64, "most tokens of an answer to `prompts`"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text} (default {default})")
    for name, ratio, text in (
        ("--random-range-ratio", 0.0, "lengths of `random` vary by so much of them, uniformly"),
        ("--input-sigma", 0.6, "of the logarithm of `log-normal` prompts"),
        ("--output-sigma", 0.5, "and of their outputs"),
    ):
        parser.add_argument(name, type=float, default=ratio, help=f"{text} (default {ratio:g})")
    parser.add_argument("--sharegpt-output-len", type=int, help="of each answer, instead of its own")
    parser.add_argument(
        "--tokenizer",
        default="smollm2",
        help="that counts the words of sharegpt and prompts (default smollm2)",
    )
    parser.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        help="go on behind the stop token; default: yes, but for sharegpt and prompts",
    )


def workload_of(
    args: argparse.Namespace, rate: float | None = None, seed: int | None = None, tokenizer: str | None = None
) -> Workload:
    """The workload that the flags ask for.

    Args:
        rate, seed: instead of the flags'
        tokenizer: instead of the flag's

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: flags that don't go together, or a file that cannot be read.
    """
    from dataclasses import replace

    from nanopd_lab.bench.workload import random_workload, trace_workload

    name, count = args.dataset_name, args.num_prompts
    rate = args.request_rate if rate is None else rate
    seed = args.seed if seed is None else seed
    if count < 1:
        raise ValueError(f"num-prompts is {count}; it must be at least 1")
    if (name in TRACES or name == "sharegpt") != (args.dataset_path is not None):
        raise ValueError(
            f"data set {name!r} is read from a file; name it with --dataset-path"
            if args.dataset_path is None
            else f"data set {name!r} is not read from a file; leave --dataset-path out, or choose one of "
            f"{', '.join((*TRACES, 'sharegpt'))}"
        )
    if args.trace_speed != 1.0 and name not in TRACES:
        raise ValueError(
            f"trace-speed is {args.trace_speed:g}, and data set {name!r} is no trace; leave it out"
        )
    arrivals = _arrivals(args, rate)
    if name in TRACES:
        own = rate is None and arrivals.ramp_up is None
        found = trace_workload(
            args.dataset_path, name, count, None if own else arrivals, seed, args.trace_speed
        )
    elif name in TEXTS:
        found = _texts(args, arrivals, seed, tokenizer or args.tokenizer)
    else:
        prefixes = args.prefix_repetition_num_prefixes if name == "prefix_repetition" else 1
        found = random_workload(count, arrivals, _lengths(args), seed, name, shared_prefix(args), prefixes)
    return found if args.ignore_eos is None else replace(found, ignore_eos=args.ignore_eos)


def shared_prefix(args: argparse.Namespace) -> int:
    """Tokens that a synthetic prompt shares with others."""
    if args.dataset_name == "prefix_repetition":
        return int(args.prefix_repetition_prefix_len)
    return int(args.random_prefix_len) if args.dataset_name == "random" else 0


def _lengths(args: argparse.Namespace) -> tuple[Sizes, Sizes]:
    """Of a synthetic prompt, without what it shares, and of its output."""
    from nanopd_lab.bench.workload import NAMED, Uniform
    from nanopd_lab.sim.workload import Lengths

    if args.dataset_name == "random":
        ratio = args.random_range_ratio
        return Uniform.around(args.random_input_len, ratio), Uniform.around(args.random_output_len, ratio)
    if args.dataset_name == "prefix_repetition":
        own, output = args.prefix_repetition_suffix_len, args.prefix_repetition_output_len
        return Uniform.around(own, 0.0), Uniform.around(output, 0.0)
    if args.dataset_name == "log-normal":
        return (
            Lengths(args.input_median, args.input_sigma, round(6 * args.input_median)),
            Lengths(args.output_median, args.output_sigma, round(5 * args.output_median)),
        )
    return NAMED[args.dataset_name]


def _arrivals(args: argparse.Namespace, rate: float | None) -> Arrivals:
    from nanopd_lab.sim.arrivals import Arrivals, RampUp

    ends = args.ramp_up_start_rps, args.ramp_up_end_rps
    ramp_up = None
    if args.ramp_up_strategy is not None:
        if None in ends:
            raise ValueError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
        ramp_up = RampUp(args.ramp_up_strategy, *ends)
    elif ends != (None, None):
        raise ValueError("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
    return Arrivals(args.default_rate if rate is None else rate, args.burstiness, ramp_up)


def _texts(args: argparse.Namespace, arrivals: Arrivals, seed: int, name: str) -> Workload:
    from nanopd_lab.bench.texts import prompts_workload, sharegpt_workload
    from nanopd_lab.engine.prompts import render_chat
    from nanopd_lab.model.loading import load_tokenizer, resolve_folder

    tokenizer = load_tokenizer(resolve_folder(name))

    def encode(text: str) -> Sequence[int]:
        return list(tokenizer(text)["input_ids"])

    def encode_chat(question: str) -> Sequence[int]:
        return list(render_chat([{"role": "user", "content": question}], tokenizer, name)["prompt_token_ids"])

    if args.dataset_name == "prompts":
        return prompts_workload(encode_chat, args.num_prompts, arrivals, seed, args.prompts_output_len)
    return sharegpt_workload(
        args.dataset_path, encode, args.num_prompts, arrivals, seed, args.sharegpt_output_len
    )
