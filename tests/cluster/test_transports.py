"""Worker processes on CPUs through the transports between machines, as test_process and test_faults through `shm`."""

from __future__ import annotations

import os
import signal

import pytest

from nanopd_lab import LLM, SamplingParams
from tests.cluster.launched import ENGINE, GREEDY, alone, finish, route, start, tokens_of, wait_for
from tests.engine.test_token_identity import prompts
from tests.transfer.workers import needs_nixl

SOME = SamplingParams(max_tokens=120, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("random:tiny", device="cpu", **ENGINE)  # type: ignore[arg-type]


BETWEEN = ["torchdist", pytest.param("nixl", marks=needs_nixl)]


@pytest.mark.parametrize(
    "transport", [*BETWEEN, "torchdist:127.0.0.1", pytest.param("shm+nixl:127.0.0.1", marks=needs_nixl)]
)
def test_tokens_are_those_of_one_engine(llm: LLM, transport: str) -> None:
    batch = prompts([3, 40, 77, 300, 64, 1500], shared=10)
    with start(transport=transport) as cluster:
        outputs = cluster.generate(batch, GREEDY, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == alone(llm, batch, GREEDY)
        for output in outputs:
            (path,) = output.paths
            assert str(path.route) == "w0→w1"
            assert len(path.attempts) == 1
            assert not path.problems()
        assert sum(output.paths[0].transferred_tokens for output in outputs) > 1500
        cluster.check_integrity()


@pytest.mark.parametrize("transport", BETWEEN)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_takes_nobody_along(llm: LLM, victim: int, transport: str) -> None:
    batch = prompts([300, 500, 200, 400], seed=3)
    want = alone(llm, batch, SOME)
    with start("1p2d", 3, transport=transport, max_restarts=1) as cluster:
        names = [cluster.submit(prompt, SOME) for prompt in batch]
        wait_for(cluster, lambda: tokens_of(cluster, names[0]) >= 2 * victim)
        pid = cluster.launcher.pid(route(cluster, names[0])[victim])  # type: ignore[union-attr]
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        outputs = finish(cluster, names)
        assert [outputs[name].outputs[0].token_ids for name in names] == want
        cluster.check_integrity()
