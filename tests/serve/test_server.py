"""The end of a server with requests under way."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import httpx
import pytest
import uvicorn

from nanopd_lab import Cluster, ClusterConfig, SamplingParams
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.serve.app import create_app
from nanopd_lab.serve.bridge import Bridge
from nanopd_lab.serve.server import Server


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(
        ClusterConfig("random:tiny", workers=1, engine={"kv_cache_memory_bytes": 1 << 26})
    ) as cluster:
        yield cluster


def test_who_goes_while_a_request_is_handed_in_cancels_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[ClusterOutput] = []
    bridge, submit, begun, gone = Bridge(cluster, settled.append), cluster.submit, Event(), Event()

    def slowly(*args: Any) -> str:
        begun.set()
        assert gone.wait(60)
        return submit(*args)

    async def leave() -> None:
        params = SamplingParams(max_tokens=4000, ignore_eos=True)
        task = asyncio.create_task(bridge.result([1, 2, 3], params))
        await asyncio.to_thread(begun.wait)
        task.cancel()
        await asyncio.wait([task])
        gone.set()
        while not settled:
            await asyncio.sleep(0.02)

    monkeypatch.setattr(cluster, "submit", slowly)
    asyncio.run(leave())
    bridge.close()
    assert settled[0].outputs[0].finish_reason == "abort"


def test_who_is_served_at_the_end_is_told(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
    server = Server(uvicorn.Config(create_app(cluster), log_config=None), grace_s=1.0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()

    def ask(stream: bool) -> httpx.Response:
        asked = {"prompt": [1, 2, 3], "max_tokens": 4000, "ignore_eos": True, "stream": stream, "logprobs": 0}
        return httpx.post(url, json=asked, timeout=60)

    with caplog.at_level(logging.ERROR), ThreadPoolExecutor() as pool:
        answers = [pool.submit(ask, stream) for stream in (False, True)]
        deadline = time.monotonic() + 60
        while sum(view.decoding for view in cluster.workers()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.should_exit = True
        whole, streamed = (answer.result() for answer in answers)
    thread.join()
    assert whole.status_code == 503
    assert "the server is stopping" in whole.json()["error"]["message"]
    *begun, last = [line for line in streamed.text.splitlines() if line]
    assert begun
    assert "the server is stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert not caplog.records


def test_what_is_not_served_is_refused_in_openais_shape(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(cluster)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            found = [await client.get("/v1/nothing"), await client.get("/v1/completions")]
            with monkeypatch.context() as patch:
                patch.setattr(cluster, "workers", lambda: {}["lost"])
                found.append(await client.get("/health"))
            return [*found, await client.get("/metrics")]

    missing, method, broken, metrics = asyncio.run(ask())
    for answer, status, message in (
        (missing, 404, "GET /v1/nothing is not served here; there are /v1/completions, /v1/chat/completions"),
        (method, 405, "GET /v1/completions is not allowed; use POST"),
        (broken, 500, "KeyError: 'lost'"),
    ):
        assert answer.status_code == status
        assert set(answer.json()) == {"error"}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert message in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == status
        assert f'nanopd_requests_refused_total{{status="{status}"}} 1.0' in metrics.text
    assert method.headers["Allow"] == "POST"
    app.state.bridge.close()
