"""The reader's side of transports whose source answers: for every source a thread that pulls from it, and a channel."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableSequence, Sequence
from contextlib import suppress
from typing import Any

import torch

from nanopd_lab.transfer.base import Pool, PoolAddress
from nanopd_lab.transfer.pull_service import CONNECT_S, line_of
from nanopd_lab.transfer.pulls import Job

START_S = 60.0  # for the other side to begin; a NIXL agent takes half a second, on busy cores several


class Channel(ABC):
    """The reader's end of a connection to a source, and of what carries the bytes beside it.

    Raises:
        OSError: nobody answers, or somebody else.
    """

    def __init__(self, details: dict[str, Any], own: Pool, seconds: float = CONNECT_S) -> None:
        self.host, self.own = details["host"], own
        self._socket = socket.create_connection((self.host, details["port"]), timeout=max(seconds, 1e-3))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lines = self._socket.makefile("rb")
            self.say({"token": details["token"]})
            self.met = self.hear(seconds)
        except BaseException:
            self._socket.close()
            raise

    @abstractmethod
    def join(self, seconds: float) -> None:
        """Make what carries the bytes, if it is not there yet, within so many seconds."""

    @abstractmethod
    def pull(
        self,
        blocks: Sequence[int],
        targets: Sequence[int],
        after: torch.cuda.Event | None,
        stopped: Callable[[], bool],
        seconds: Callable[[], float],
    ) -> None:
        """Ask for blocks chunk by chunk, and write them to those of the own pool; fewer if it is `stopped`.

        Args:
            after: what may still write to the target blocks
            seconds: left

        Raises:
            OSError, RuntimeError: the source is gone or too slow; the channel is of no use any more.
        """

    def generations(self, blocks: Sequence[int], seconds: float) -> list[int]:
        """What they are there by now.

        Raises:
            OSError: as `pull`.
        """
        self.say({"check": list(blocks)})
        return self.hear(seconds)["generations"]

    @property
    def address(self) -> str:
        """Of this machine, as the source sees it."""
        return self._socket.getsockname()[0]

    def say(self, message: dict[str, Any]) -> None:
        """Send a line."""
        self._socket.sendall(line_of(message))

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next line, within so many seconds."""
        self._socket.settimeout(max(seconds, 1e-3))
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the source has closed the connection")
        return json.loads(line)

    def interrupt(self) -> None:
        """End what is under way, with an error. From any thread."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """When it returns, no target block is written any more. From the thread that pulls; safe to call twice."""
        self.interrupt()
        self._socket.close()


class Link:
    """A source as its reader sees it: a thread that pulls from it, and makes a new channel where one has failed.

    Args:
        make: a channel, in so many seconds; called here once, and afterwards by the thread
        heard: where generations go that the source says; None: this process can look itself
        done: gets jobs that have ended, why, and when
        name: of the transport
    """

    def __init__(
        self,
        address: PoolAddress,
        make: Callable[[float], Channel],
        heard: MutableSequence[int] | None,
        done: queue.SimpleQueue[Any],
        name: str,
    ) -> None:
        self._worker, self._make, self._heard, self._done = address.worker, make, heard, done
        self._channel: Channel | None = make(CONNECT_S)
        self._todo: queue.SimpleQueue[tuple[Job, Any] | None] = queue.SimpleQueue()
        self._closed = False
        self._starting = threading.Lock()
        self._current: Job | None = None
        self.thread = threading.Thread(target=self._run, name=f"nanopd-{name}-{self._worker}", daemon=True)
        self.thread.start()

    def put(self, job: Job, after: Any) -> None:
        """Pull; `after`: a CUDA event behind what may still write to the target blocks, or None."""
        self._todo.put((job, after))

    def withdraw(self, job: Job) -> bool:
        """True if a stopped job has not begun, and so never will."""
        with self._starting:
            return self._current is not job

    def close(self) -> None:
        """Stop soon; nobody is waited for."""
        self._closed = True
        self._todo.put(None)
        if (channel := self._channel) is not None:
            channel.interrupt()

    def _run(self) -> None:
        with suppress(OSError, RuntimeError, ValueError):  # the first pull will say what is wrong
            self._joined(START_S)
        while (item := self._todo.get()) is not None:
            self._done.put((item[0], self._fetch(*item), time.monotonic()))
            del item  # an idle thread keeps no job
        if self._channel is not None:
            self._channel.close()

    def _joined(self, seconds: float) -> Channel:
        if self._channel is None:
            self._channel = self._make(min(seconds, CONNECT_S))
        if self._closed:  # perhaps before it was there to be interrupted
            self._channel.interrupt()
        self._channel.join(seconds)
        return self._channel

    def _fetch(self, job: Job, after: Any) -> str | None:
        """Why it failed, None if it did not."""

        def seconds() -> float:
            return job.deadline - time.monotonic()

        def stopped() -> bool:
            return job.stop is not None or self._closed or seconds() < 0

        with self._starting:
            if stopped():
                return None  # whoever stopped it has said why, or the clock will
            self._current = job
        pull = job.pull
        try:
            channel = self._joined(min(seconds(), START_S))
            channel.pull(pull.source_blocks, pull.target_blocks, after, stopped, seconds)
            if self._heard is not None and not stopped():
                found = channel.generations(pull.source_blocks, seconds())
                for block, generation in zip(pull.source_blocks, found, strict=True):
                    self._heard[block] = generation
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            failed, self._channel = self._channel, None
            if failed is not None:
                failed.close()
            return f"{self._worker} did not send: {type(error).__name__}: {error}"
        finally:
            self._current = None
        return None
