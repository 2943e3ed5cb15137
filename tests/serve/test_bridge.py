"""The bridge between the cluster's thread and asyncio."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from typing import Any

import pytest

from nanopd_lab import Cluster, ClusterConfig, SamplingParams
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.serve.bridge import Bridge

LONG = SamplingParams(max_tokens=900, ignore_eos=True)


class Held(Cluster):
    """Takes requests in only after `taken` is set."""

    def __init__(self, config: ClusterConfig) -> None:
        self.asked, self.taken = threading.Event(), threading.Event()
        super().__init__(config)

    def submit(self, *args: Any, **options: Any) -> str:
        self.asked.set()
        assert self.taken.wait(60)
        return super().submit(*args, **options)


@pytest.fixture(scope="module")
def cluster() -> Any:
    with Held(ClusterConfig("random:tiny-llama", workers=1)) as cluster:
        yield cluster
        cluster.check_integrity()


def test_who_goes_while_its_request_is_being_submitted_cancels_it(cluster: Held) -> None:
    """The thread that submits cannot be cancelled: it comes behind, and nobody would read what it starts."""

    async def goes() -> None:
        async def read() -> None:
            async with aclosing(bridge.outputs([1, 2, 3], LONG)) as outputs:  # type: ignore[type-var]
                async for _ in outputs:
                    pass

        reader = asyncio.create_task(read())
        await asyncio.to_thread(cluster.asked.wait, 60)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert bridge.running == 0
        cluster.taken.set()
        while not settled:
            await asyncio.sleep(0.01)

    settled: list[ClusterOutput] = []
    bridge = Bridge(cluster, settled.append)
    asyncio.run(goes())
    bridge.close()
    (output,) = settled
    assert output.outputs[0].finish_reason == "abort"
