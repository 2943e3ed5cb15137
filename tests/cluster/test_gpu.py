"""Workers that share a GPU, or have one each: the same tokens through every transport, also when one is killed."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from nanopd_lab import LLM, Cluster, ClusterConfig, SamplingParams
from tests.cluster.launched import finish, route, tokens_of, wait_for
from tests.engine.test_token_identity import prompts

pytestmark = pytest.mark.gpu

ENGINE = {"kv_cache_memory_bytes": 1 << 28, "max_num_batched_tokens": 256, "max_num_seqs": 8}
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
LONG = SamplingParams(max_tokens=900, temperature=0, ignore_eos=True)


def start(transport: str, launcher: str, workers: int = 2, **more: Any) -> Cluster:
    gpus = torch.cuda.device_count()
    devices = tuple(f"cuda:{number % gpus}" for number in range(workers))
    policy = f"1p{workers - 1}d"
    return Cluster(
        ClusterConfig(
            "random:tiny-gpu",
            workers=workers,
            policy=policy,
            launcher=launcher,
            transport=transport,
            devices=devices,
            share_devices=True,
            engine=ENGINE,
            **more,
        )
    )


@pytest.fixture(scope="module")
def answers() -> tuple[list[list[int]], list[list[int]], list[int]]:
    batch = prompts([1, 16, 17, 64, 300, 900], shared=20)
    llm = LLM("random:tiny-gpu", device="cuda", **ENGINE)  # type: ignore[arg-type]
    outputs = llm.generate(batch, GREEDY, use_tqdm=False)
    (long,) = llm.generate(batch[5:], LONG, use_tqdm=False)
    return batch, [output.outputs[0].token_ids for output in outputs], long.outputs[0].token_ids


@pytest.mark.parametrize("launcher", ["inline", "process"])
@pytest.mark.parametrize("transport", ["auto", "p2p", "pinned"])
def test_tokens_are_those_of_one_engine_through_every_transport(
    answers: tuple[list[list[int]], list[list[int]], list[int]], transport: str, launcher: str
) -> None:
    batch, want, _ = answers
    with start(transport, launcher) as cluster:
        for _ in range(2):
            outputs = cluster.generate(batch, GREEDY, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == want
            for output in outputs:
                assert not output.paths[0].problems()
                assert str(output.paths[0].route) == "w0→w1"
        assert sum(output.paths[0].transferred_tokens for output in outputs) > 0
        cluster.check_integrity()


@pytest.mark.parametrize("transport", ["p2p", "pinned"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_takes_nobody_along(
    answers: tuple[list[list[int]], list[list[int]], list[int]], transport: str, victim: int
) -> None:
    batch, _, want = answers
    with start(transport, "process", 3, max_restarts=1) as cluster:
        names = [cluster.submit(batch[5], LONG) for _ in range(4)]
        wait_for(cluster, lambda: tokens_of(cluster, names[0]) >= 2 * victim)
        pid = cluster.launcher.pid(route(cluster, names[0])[victim])  # type: ignore[union-attr]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        outputs = finish(cluster, names)
        assert [outputs[name].outputs[0].token_ids for name in names] == [want] * 4
        cluster.check_integrity()
