"""`nanopd-lab`: the engine from the command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from nanopd_lab import __version__

# Modules with a function `register`, which adds a command; the second ones' packages take long to import.
COMMANDS = (
    "demo.cli", "cluster.cli", "transfer.cli", "sim.cli", "cost.cli", "bench.parity_cli", "bench.serving_cli",
    "bench.sweep_cli", "bench.plan_cli", "bench.regret.cli", "bench.simulator", "bench.fleet.cli",
    "serve.cli",
)  # fmt: skip
SLOW_TO_IMPORT = ("kernels.cli", "router.predictor.cli")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for bad input, with the reason on stderr)."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(name)s: %(message)s")  # a worker that died, say
    try:
        args = build_parser(argv[0] if argv else None).parse_args(argv)
        for name in ("result_filename", "summary_filename", *getattr(args, "outputs", ())):
            _check_result(getattr(args, name, None), "--" + name.replace("_", "-"))
        return args.run(args) or 0
    except ValueError as error:
        print(f"nanopd-lab: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"nanopd-lab: {error.filename}: {error.strerror}; check the path", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nanopd-lab: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of a command with fifty flags would bury it. Takes no flag for another
    that begins alike: of fifty, one often does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _check_result(path: str | Path | None, flag: str) -> None:
    """Before anything is measured: a result that cannot be written would be lost."""
    if path is None:
        return
    if Path(path).is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file in it")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {Path(path).parent}; make it, or name another")
    if not os.access(path if Path(path).exists() else Path(path).parent, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written; change its permissions, or name another")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """All commands; heavy imports wait until a command runs.

    Args:
        command: the one that is asked for. Commands whose packages take long to import are left out if it is another.
    """
    parser = _Parser(prog="nanopd-lab", description=__doc__)
    parser.add_argument("--version", action="version", version=f"nanopd-lab {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    chat = commands.add_parser("chat", help="answer ten conversations at once and show what the engine did")
    _engine_options(chat)
    chat.add_argument("--max-tokens", type=int, default=48, help="longest answer")
    chat.set_defaults(run=_chat)

    generate = commands.add_parser("generate", help="continue a prompt, or answer it as a chat")
    _engine_options(generate)
    generate.add_argument("prompt", nargs="+", help="one or more prompts; - reads one from standard input")
    generate.add_argument("--chat", action="store_true", help="use the model's chat template")
    for flag, kind, default in (
        ("--max-tokens", int, 64),
        ("--temperature", float, 0.0),
        ("--top-p", float, 1.0),
        ("--top-k", int, 0),
        ("--min-p", float, 0.0),
        ("--n", int, 1),
        ("--seed", int, None),
        ("--logprobs", int, None),
    ):
        generate.add_argument(flag, type=kind, default=default, help=f"default {default}")
    generate.add_argument("--stop", action="append", help="end the output before this text (repeatable)")
    generate.add_argument("--ignore-eos", action="store_true", help="go on behind the stop token")
    generate.add_argument("--json", action="store_true", help="one JSON object a prompt, with metrics")
    from nanopd_lab.cluster.cli import add_cluster_options

    add_cluster_options(generate)
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="what this machine has and what the engine would use")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    ceilings = commands.add_parser("ceilings", help="measure this machine's memory bandwidth and matmul peak")
    ceilings.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    ceilings.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    ceilings.add_argument("--rounds", type=int, default=15, help="the best of so many counts")
    ceilings.add_argument("--result-filename", type=Path, help="write a record with its provenance, as JSON")
    ceilings.set_defaults(run=_ceilings)

    offline = commands.add_parser("bench-offline", help="throughput beside Hugging Face, in one run")
    offline.add_argument("--model", default="smollm2")
    offline.add_argument("--dtype", help="default: bfloat16, and float32 on a CPU without a unit for it")
    offline.add_argument("--device", default="auto")
    offline.add_argument("--num-prompts", type=int, default=16)
    offline.add_argument("--min-input-len", type=int, default=32)
    offline.add_argument("--max-input-len", type=int, default=512)
    offline.add_argument("--output-len", type=int, default=64)
    offline.add_argument("--max-num-batched-tokens", type=int, default=512)
    offline.add_argument("--peers", nargs="*", default=["hf-padded", "hf-continuous"])
    offline.add_argument("--rounds", type=int, default=3)
    offline.add_argument("--seed", type=int, default=0)
    offline.add_argument("--result-filename", type=Path, help="write the full result there, as JSON")
    offline.set_defaults(run=_bench_offline)

    engine = commands.add_parser(
        "bench-engine", help="step times and throughput of one GPU, beside its limits"
    )
    engine.add_argument("--model", default="random:qwen3-8b")
    engine.add_argument("--dtype", default="bfloat16")
    engine.add_argument("--modes", nargs="+", default=["eager", "off", "default"], help="and tuned")
    engine.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64], help="of decode steps")
    engine.add_argument("--context", type=int, default=512, help="of decode steps")
    engine.add_argument("--prompt-lengths", nargs="+", type=int, default=[512, 2048])
    engine.add_argument("--workloads", nargs="*", default=["64", "256"], help="64, 256: requests at once")
    engine.add_argument("--peer", action="store_true", help="also Hugging Face's generate_batch")
    engine.add_argument("--rounds", type=int, default=2, help="of each workload")
    engine.add_argument("--max-num-batched-tokens", type=int, default=8192)
    engine.add_argument("--result-filename", type=Path, help="written after every part, as JSON")
    engine.set_defaults(run=_bench_engine)
    for modules in (COMMANDS, SLOW_TO_IMPORT):
        if command not in commands.choices:
            for module in modules:
                import_module(f"nanopd_lab.{module}").register(commands)
    return parser


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2", help="default smollm2, the embedded model")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--max-num-batched-tokens", type=int, default=512, help="tokens a step may hold")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences that run at once")
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="size of the KV pool")
    parser.add_argument("--block-size", type=int, default=16, help="tokens a KV block")
    parser.add_argument(
        "--compilation", default="off", help="off, default or tuned; the model's, by torch.compile"
    )
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of the GPU's memory")
    parser.add_argument("--no-enable-prefix-caching", action="store_true", help="compute every prompt anew")


def _chat(args: argparse.Namespace) -> int:
    from nanopd_lab.demo.chat import run_chat

    run_chat(_llm(args), max_tokens=args.max_tokens)
    return 0


def _generate(args: argparse.Namespace) -> int:
    from nanopd_lab import SamplingParams

    params = SamplingParams(
        n=args.n,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop=args.stop,
        logprobs=args.logprobs,
        ignore_eos=args.ignore_eos,
    )
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]
    quiet = args.json or len(prompts) == 1
    if args.workers != 1 or args.launcher != "process":
        from nanopd_lab.cluster.cli import cluster_of

        with cluster_of(args) as cluster:
            outputs = _answers(cluster, prompts, params, args.chat, quiet)
    else:
        outputs = _answers(_llm(args), prompts, params, args.chat, quiet)
    for prompt, output in zip(prompts, outputs, strict=True):
        if args.json:
            from dataclasses import asdict

            print(json.dumps({**asdict(output), "prompt": prompt}))
            continue
        for sample in output.outputs:
            print(f"[{sample.finish_reason}] {prompt}{' →' if args.chat else ''}{sample.text}")
    return 0


def _answers(engine: Any, prompts: list[str], params: Any, chat: bool, quiet: bool) -> list[Any]:
    if chat:
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return list(engine.chat(conversations, params, use_tqdm=not quiet))
    return list(engine.generate(prompts, params, use_tqdm=not quiet))


def _info(args: argparse.Namespace) -> int:
    from nanopd_lab.machine import describe_machine

    report = describe_machine()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        width = max(map(len, report))
        for name, value in report.items():
            print(f"{name:{width}}  {value}")
    return 0


def _ceilings(args: argparse.Namespace) -> int:
    import torch

    from nanopd_lab.bench.ceilings import format_ceilings, measure_ceilings, record_of

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = measure_ceilings(device, args.dtypes, args.rounds)
    print(format_ceilings(found))
    if args.result_filename:
        args.result_filename.write_text(json.dumps(record_of(found), indent=1) + "\n")
    return 0


def _bench_offline(args: argparse.Namespace) -> int:
    from nanopd_lab.bench.offline import Workload, format_offline, run_offline

    result = run_offline(
        args.model,
        dtype=args.dtype,
        device=args.device,
        workload=Workload(
            args.num_prompts, args.min_input_len, args.max_input_len, args.output_len, args.seed
        ),
        peers=tuple(args.peers),
        rounds=args.rounds,
        max_num_batched_tokens=args.max_num_batched_tokens,
        report=lambda line: print(line, file=sys.stderr),
    )
    print(format_offline(result))
    if args.result_filename:
        args.result_filename.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _bench_engine(args: argparse.Namespace) -> int:
    from nanopd_lab.bench.engine import format_engine, run_engine

    def save(record: dict[str, Any]) -> None:
        if args.result_filename:
            args.result_filename.write_text(json.dumps(record, indent=1) + "\n")

    options = ("dtype", "batches", "context", "prompt_lengths", "workloads", "peer", "rounds")
    record = run_engine(
        args.model,
        args.modes,
        **{name: getattr(args, name) for name in options},
        max_num_batched_tokens=args.max_num_batched_tokens,
        report=lambda line: print(line, file=sys.stderr),
        save=save,
    )
    save(record)
    print(format_engine(record))
    return 0


def _llm(args: argparse.Namespace):  # type: ignore[no-untyped-def]  # LLM would have to be imported
    from nanopd_lab import LLM

    return LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        block_size=args.block_size,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=args.max_num_seqs,
        kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        compilation=args.compilation,
        cuda_graphs=not args.enforce_eager,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enable_prefix_caching=not args.no_enable_prefix_caching,
    )


if __name__ == "__main__":
    sys.exit(main())
