"""Between the cluster, which is polled by one thread, and asyncio, where every request waits for its own outputs."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress

from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.core import SamplingParams
from nanopd_lab.engine.prompts import Prompt

POLL_S = 0.5
SETTLE_S = 5.0  # accounts come milliseconds behind the last token, unless a worker has died


class _Inbox:
    """The latest of what a request has become. Outputs are cumulative, so that a slow reader skips some and loses
    nothing."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._fresh = asyncio.Event()
        self._latest: ClusterOutput | BaseException | None = None

    def put(self, found: ClusterOutput | BaseException) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._set, found)

    def _set(self, found: ClusterOutput | BaseException) -> None:
        self._latest = found
        self._fresh.set()

    async def get(self) -> ClusterOutput:
        """The next one, or what has stopped the cluster."""
        await self._fresh.wait()
        self._fresh.clear()
        if isinstance(self._latest, BaseException):
            raise self._latest
        assert self._latest is not None
        return self._latest


class Bridge:
    """Requests of asyncio through one cluster.

    Args:
        cluster: whose outputs nobody else polls; with a launcher other than "inline"
        settled: is told of every request whose accounts are complete, in the bridge's thread

    Raises:
        ValueError: an inline cluster, which computes only while somebody waits for it.
    """

    def __init__(
        self, cluster: Cluster, settled: Callable[[ClusterOutput], None] = lambda output: None
    ) -> None:
        if cluster.config.launcher == "inline":
            raise ValueError(
                f"launcher is {cluster.config.launcher!r}, and a server needs a cluster that runs by itself; use "
                '"process"'
            )
        self.cluster = cluster
        self._settled = settled
        self._inboxes: dict[str, _Inbox] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._deliver, name="nanopd-bridge", daemon=True)
        self._thread.start()

    async def outputs(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[ClusterOutput]:
        """What becomes of a request, until it has finished and, if that takes less than `SETTLE_S`, its accounts are
        complete. A reader that goes away cancels it.

        Raises:
            InvalidRequestError: it can never be served
            ClusterBusyError: the queue is full
            ClusterDownError: no worker is left
            RuntimeError: the controller stopped
        """
        name, inbox = f"served-{uuid.uuid4().hex}", _Inbox()
        self._inboxes[name] = inbox
        finished = False

        def too_late(submitted: asyncio.Future[str]) -> None:
            if not submitted.cancelled() and submitted.exception() is None:
                self.cluster.cancel(name)

        # Tokenizing a long prompt must not hold up the other streams.
        submitting = asyncio.ensure_future(asyncio.to_thread(self.cluster.submit, prompt, params, name))
        try:
            await asyncio.shield(submitting)  # a thread goes on, whoever is cancelled
            while not finished:
                output = await inbox.get()
                finished = output.finished
                yield output
            if not output.settled and (settled := await self._settles(inbox)):
                yield settled
        finally:
            del self._inboxes[name]
            if not submitting.done():
                submitting.add_done_callback(too_late)
            elif not finished:
                self.cluster.cancel(name)

    async def _settles(self, inbox: _Inbox) -> ClusterOutput | None:
        """With complete accounts, or None if they don't come."""

        async def wait() -> ClusterOutput:
            while not (output := await inbox.get()).settled:
                pass
            return output

        with suppress(asyncio.TimeoutError, RuntimeError, ValueError):  # the answer is there all the same
            return await asyncio.wait_for(wait(), SETTLE_S)
        return None

    async def result(self, prompt: Prompt, params: SamplingParams) -> ClusterOutput:
        """What has become of it in the end; as `outputs`."""
        async with aclosing(self.outputs(prompt, params)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                last = output
        return last

    @property
    def running(self) -> int:
        """Requests that have come and not ended."""
        return len(self._inboxes)

    def fail(self, error: Exception) -> None:
        """Whoever waits gets this error, and cancels its request."""
        for inbox in list(self._inboxes.values()):
            inbox.put(error)

    def close(self) -> None:
        """Stop delivering; the cluster stays."""
        self._closed.set()
        self._thread.join()

    def _deliver(self) -> None:
        while not self._closed.is_set():
            try:
                outputs = self.cluster.poll(POLL_S)
            except (
                RuntimeError,
                ValueError,
            ) as error:  # the controller has stopped, or the cluster is closed
                self.fail(error)
                if self._closed.wait(POLL_S):
                    return
                continue
            for output in outputs:
                if output.settled:
                    self._settled(output)
                if (waiting := self._inboxes.get(output.request_id)) is not None:
                    waiting.put(output)
