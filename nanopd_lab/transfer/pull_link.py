"""The reader's side of `torchdist`: for every source a thread that pulls from it, a connection and a process group."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, MutableSequence, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from nanopd_lab.transfer.base import Pool, PoolAddress
from nanopd_lab.transfer.process_groups import CONNECT_S, PairGroup, reached_store
from nanopd_lab.transfer.pull_service import WINDOW, line_of
from nanopd_lab.transfer.pulls import Job
from nanopd_lab.transfer.staging import Staging


class Channel:
    """The reader's end of a connection to a source, and of the process group beside it.

    Raises:
        OSError: nobody answers, or somebody else.
    """

    def __init__(self, details: dict[str, Any], device: torch.device) -> None:
        self._host, self._device = details["host"], device
        self._socket = socket.create_connection((self._host, details["port"]), timeout=CONNECT_S)
        self._group: PairGroup | None = None
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._lines = self._socket.makefile("rb")
            self._socket.sendall(line_of({"token": details["token"]}))
            self._met = self._line()
        except BaseException:
            self.close()
            raise

    def join(self) -> PairGroup:
        """Make the process group, once."""
        if self._group is None:
            store = dist.PrefixStore(str(self._met["pair"]), reached_store(self._host, self._met["store"]))
            self._group = PairGroup(store, 1, self._socket.getsockname()[0], self._device)
        return self._group

    def pull(
        self,
        blocks: Sequence[int],
        targets: Sequence[int],
        staging: Staging,
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
        group, step = self.join(), staging.blocks_each
        parts = [slice(first, first + step) for first in range(0, len(blocks), step)]
        flying: list[list[dist.Work]] = []
        for number, part in enumerate(parts):
            while len(flying) < min(number + WINDOW, len(parts)) and not stopped():
                asked = parts[len(flying)]
                # Asked for first: NCCL's first receive waits until the other side sends.
                self._socket.sendall(line_of({"blocks": list(blocks[asked]), "seconds": seconds()}))
                places = staging.incoming(len(flying), targets[asked])
                flying.append([group.receive(each) for each in places])
            if number == len(flying):
                return
            for work in flying[number]:
                group.wait(work, seconds())
            flying[number] = []
            staging.take_in(number, targets[part], after)

    def generations(self, blocks: Sequence[int], seconds: float) -> list[int]:
        """What they are there by now.

        Raises:
            OSError: as `pull`.
        """
        self._socket.settimeout(max(seconds, 1e-3))
        self._socket.sendall(line_of({"check": list(blocks)}))
        return self._line()["generations"]

    def _line(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionError("the source has closed the connection")
        return json.loads(line)

    def close(self) -> None:
        """End what is under way, with an error. From any thread; safe to call twice."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._group is not None:
            self._group.abort()
        self._socket.close()


class Link:
    """A source as its reader sees it: a thread that pulls from it, and makes a new channel where one has failed."""

    def __init__(
        self,
        address: PoolAddress,
        own: Pool,
        heard: MutableSequence[int] | None,
        done: queue.SimpleQueue[Any],
    ) -> None:
        self._address, self._own, self._heard, self._done = address, own, heard, done
        self._channel: Channel | None = Channel(address.details, own.memory.device)
        self._todo: queue.SimpleQueue[tuple[Job, Any] | None] = queue.SimpleQueue()
        self._closed = False
        self._starting = threading.Lock()
        self._current: Job | None = None
        self.thread = threading.Thread(
            target=self._run, name=f"nanopd-torchdist-{address.worker}", daemon=True
        )
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
            channel.close()

    def _run(self) -> None:
        staging = Staging(self._own, WINDOW)
        with suppress(OSError, RuntimeError, ValueError):  # the first pull will say what is wrong
            self._joined()
        while (item := self._todo.get()) is not None:
            self._done.put((item[0], self._fetch(staging, *item), time.monotonic()))
            del item  # an idle thread keeps no job
        if self._channel is not None:
            self._channel.close()

    def _joined(self) -> Channel:
        if self._channel is None:
            self._channel = Channel(self._address.details, self._own.memory.device)
            if self._closed:
                self._channel.close()
        self._channel.join()
        return self._channel

    def _fetch(self, staging: Staging, job: Job, after: Any) -> str | None:
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
            channel = self._joined()
            channel.pull(pull.source_blocks, pull.target_blocks, staging, after, stopped, seconds)
            if self._heard is not None and not stopped():
                found = channel.generations(pull.source_blocks, seconds())
                for block, generation in zip(pull.source_blocks, found, strict=True):
                    self._heard[block] = generation
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            failed, self._channel = self._channel, None
            if failed is not None:
                failed.close()
            return f"{self._address.worker} did not send: {type(error).__name__}: {error}"
        finally:
            self._current = None
        return None
