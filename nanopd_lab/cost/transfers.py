"""Times pulls of KV blocks by every transport between every pair of devices: the links of a profile.

A pull is timed as in `nanopd-lab transfer bench`: on the host, from `start` to the `poll` that reports it, alone, with
scattered blocks, source and reader in two processes (`inproc`: in one).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from nanopd_lab.kv.cache import KVShape
from nanopd_lab.transfer.registry import default_transports
from nanopd_lab.transfer.timed_pair import Pair, sources
from nanopd_lab.transfer.timed_plan import Plan

TOKENS = (16, 64, 256, 1024, 2048)  # of a pull
ROUNDS = 7


def profile_transfers(
    shape: KVShape,
    devices: Sequence[torch.device],
    tokens: Sequence[int] = TOKENS,
    rounds: int = ROUNDS,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Rows of transport, source, target, blocks, bytes and the seconds of each round.

    Args:
        devices: of the workers; every ordered pair of two, or the only one with itself
        rounds: pulls of each size; one more before them is thrown away, and its bytes are checked
    """
    pairs = [(a, b) for a in devices for b in devices if a != b] or [(devices[0], devices[0])]
    rows = []
    with tqdm(total=len(pairs), desc="transfers", unit="pair", disable=not progress) as bar:
        for source in dict.fromkeys(a for a, _ in pairs):
            targets = [b for a, b in pairs if a == source]
            for processes in (1, 2) if source.type == "cpu" else (2,):
                plan = Plan(shape, tuple(tokens), source, targets[0], rounds)
                names = [
                    name
                    for name in dict.fromkeys(n for t in targets for n in default_transports(source, t))
                    if (name == "inproc") == (processes == 1)
                ]
                with sources(names, plan, processes) as found:
                    for target in targets:
                        here = replace(plan, target=target)
                        able = default_transports(source, target)
                        for name, (address, pools) in zip(names, found, strict=True):
                            if name in able:
                                with closing(Pair(name, here, address, pools)) as pair:
                                    rows += _time(pair, here)
            bar.update(len(targets))
    return rows


def _time(pair: Pair, plan: Plan) -> list[dict[str, Any]]:
    for tokens in plan.tokens:
        pair.pull(tokens, 1, check=True)
    seconds: dict[int, list[float]] = {tokens: [] for tokens in plan.tokens}
    for _ in range(plan.rounds):
        for tokens, times in seconds.items():
            times.append(pair.pull(tokens, 1))
    block_bytes = plan.shape.block_bytes
    rows = []
    for tokens, times in seconds.items():
        blocks = -(-tokens // plan.shape.block_size)
        rows.append({
            "transport": pair.name, "source": str(plan.source), "target": str(plan.target), "blocks": blocks,
            "bytes": blocks * block_bytes, "seconds": times,
        })  # fmt: skip
    return rows
