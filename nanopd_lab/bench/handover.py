"""What a hand-over costs a request: one prompt at a time through a prefill and a decode worker, in real processes.

    nanopd-lab bench-handover --model random:qwen3-8b --transports pinned p2p --prompt-lengths 2048 8192

For each prompt: how long its prefill takes, how long pulls are under way, and how much of that the request waits for
(visible), because the last chunk's copy can only begin when it is computed. The rest is hidden behind the computation
of later chunks.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.config import ClusterConfig
from nanopd_lab.core import SamplingParams
from nanopd_lab.provenance import provenance

SCHEMA = "nanopd-lab/handover/1"


def measure_handover(
    config: ClusterConfig, prompt_lengths: Sequence[int], rounds: int = 5, output_tokens: int = 8
) -> list[dict[str, Any]]:
    """Medians over `rounds` prompts of each length, one at a time.

    Returns:
        rows with `prompt_tokens`, `prefill_ms`, `transfer_ms`, `visible_ms` (all of the same request's median round),
        `visible_share` of the prefill, `bytes`, `pulls`, `ttft_ms`, `tpot_ms`

    Raises:
        ValueError: as `ClusterConfig` and `Cluster`; or a route that was not disaggregated.
    """
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
    rng = random.Random(0)
    rows = []
    with Cluster(config) as cluster:
        for length in prompt_lengths:
            found = []
            for _ in range(rounds + 1):
                prompt = [rng.randrange(cluster.vocab_size) for _ in range(length)]
                (output,) = cluster.generate([prompt], params, use_tqdm=False)
                (path,) = output.paths
                if path.transferred_tokens != length:
                    raise ValueError(
                        f"{path.transferred_tokens} of {length} tokens were transferred on {path.route}"
                    )
                usage = path.attempts[-1].decode
                assert usage is not None
                assert path.prefill_s is not None
                assert path.transfer_visible_s is not None
                found.append(
                    {
                        "prefill_ms": path.prefill_s * 1e3,
                        "transfer_ms": path.transfer_s * 1e3,
                        "visible_ms": path.transfer_visible_s * 1e3,
                        "ttft_ms": (output.metrics.ttft or 0.0) * 1e3,
                        "tpot_ms": (output.metrics.tpot(output_tokens) or 0.0) * 1e3,
                        "bytes": path.transferred_bytes,
                        "pulls": len(usage.pulls),
                    }
                )
            row = {key: statistics.median(each[key] for each in found[1:]) for key in found[0]}
            shares = [each["visible_ms"] / each["prefill_ms"] for each in found[1:]]
            rows.append({"prompt_tokens": length, **row, "visible_share": statistics.median(shares)})
    return rows


def run_handover(
    model: str,
    transports: Sequence[str],
    prompt_lengths: Sequence[int],
    *,
    rounds: int = 5,
    engine: dict[str, Any] | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """The record for several transports; each starts two workers of its own."""
    measured = {}
    for transport in transports:
        config = ClusterConfig(
            model,
            workers=2,
            policy="1p1d",
            transport=transport,
            share_devices=True,
            threads=threads,
            engine={"enable_prefix_caching": False, **(engine or {})},
        )
        measured[transport] = measure_handover(config, prompt_lengths, rounds)
    return {
        "schema": SCHEMA,
        "provenance": provenance(),
        "model": model,
        "engine": engine or {},
        "rounds": rounds,
        "transports": measured,
    }


def format_handover(record: dict[str, Any]) -> str:
    """A row a transport and prompt length."""
    lines = [
        f"{'transport':10}{'tokens':>8}{'MB':>8}{'pulls':>7}{'prefill ms':>12}{'copying ms':>12}{'visible ms':>12}"
    ]
    for transport, rows in record["transports"].items():
        for row in rows:
            lines.append(
                f"{transport:10}{row['prompt_tokens']:8}{row['bytes'] / 1e6:8.1f}{row['pulls']:7.0f}"
                f"{row['prefill_ms']:12.1f}{row['transfer_ms']:12.1f}{row['visible_ms']:12.1f} "
                f"({row['visible_share']:.1%} of prefill)"
            )
    return "\n".join(lines)
