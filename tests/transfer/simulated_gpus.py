"""GPUs without a GPU: streams that advance in random order and wait for nothing but events.

A wait that is missing, or an event recorded too early, shows in some of the orders as wrong bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from nanopd_lab.transfer import cuda_pools, p2p, pinned
from nanopd_lab.transfer.pinned import PinnedTransport


class SimulatedStream:
    device = torch.device("cpu")

    def __init__(self, gpus: SimulatedGpus) -> None:
        self.work: deque[tuple[str, Any]] = deque()
        self.gpus = gpus
        gpus.streams.append(self)

    def wait_event(self, event: SimulatedEvent) -> None:
        self.work.append(("wait", event.last))

    def wait_stream(self, other: SimulatedStream) -> None:
        event = SimulatedEvent()
        event.record(other)
        self.wait_event(event)

    def query(self) -> bool:
        return not self.work

    def step(self) -> bool:
        """Do the first thing in the queue; False if there is none or it must wait."""
        if not self.work or (self.work[0][0] == "wait" and not self.work[0][1]):
            return False
        what, given = self.work.popleft()
        if what == "copy":
            ctypes.memmove(*given)
        elif what == "launch":
            given()
        elif what == "record":
            given.append(True)
        return True

    def synchronize(self) -> None:
        for _ in range(100_000):
            if not self.work:
                return
            self.gpus.advance(1)
        raise AssertionError("a stream waits for an event that never passes")


class SimulatedEvent:
    """Who waits does so for the recording that was the last one then: an event may be recorded again."""

    def __init__(self) -> None:
        self.last = [True]  # filled when it has passed; as CUDA has it, an event never recorded has

    def record(self, stream: SimulatedStream) -> None:
        self.last = []
        stream.work.append(("record", self.last))

    def query(self) -> bool:
        return bool(self.last)

    def wait(self, stream: SimulatedStream) -> None:
        stream.wait_event(self)


class SimulatedPuller:
    def __init__(self, to_pool: torch.Tensor, stream: SimulatedStream) -> None:
        self.to_pool, self.stream = to_pool, stream

    def enqueue(self, from_pool: torch.Tensor, ids: torch.Tensor, count: int) -> None:
        # The ids are read when it runs, as on a GPU.
        def work() -> None:
            torch.ops.nanopd.pull_blocks(self.to_pool, ids[:count], from_pool, ids[count : 2 * count])

        self.stream.work.append(("launch", work))


class SimulatedGpus:
    """Every stream of every device; `current` is what `torch.cuda.stream` has chosen, `computing` the default one."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(seed)
        self.streams: list[SimulatedStream] = []
        self.current = self.computing = SimulatedStream(self)
        self._install(monkeypatch)

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.random.choice(self.streams).step()

    def run_a_little(self) -> None:
        self.advance(self.random.randint(0, 4))

    def copy(self, target: int, source: int, num_bytes: int, stream: SimulatedStream) -> None:
        stream.work.append(("copy", (target, source, num_bytes)))

    @contextlib.contextmanager
    def stream(self, stream: SimulatedStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def _install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In place of what the transports call of torch and the driver. All memory is the host's, one device 'cpu'."""
        for name, value in {
            "Stream": lambda *_, **__: SimulatedStream(self),
            "Event": SimulatedEvent,
            "device": lambda _: contextlib.nullcontext(),
            "stream": self.stream,
            "current_stream": lambda _: self.current,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        empty = torch.empty
        monkeypatch.setattr(
            torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options)
        )
        monkeypatch.setattr(
            PinnedTransport, "_pinned", staticmethod(lambda n: torch.zeros(n, dtype=torch.uint8))
        )
        monkeypatch.setattr(pinned, "copy_async", self.copy)
        monkeypatch.setattr(p2p, "Puller", SimulatedPuller)
        monkeypatch.setattr(cuda_pools.CudaPoolTransport, "_check_cuda", lambda *_: None)
        monkeypatch.setattr(cuda_pools, "device_of", lambda _: torch.device("cpu"))
        monkeypatch.setattr(
            cuda_pools, "export_memory", lambda m: {"pointer": m.data_ptr(), "gpu": "simulated"}
        )
        monkeypatch.setattr(cuda_pools, "open_memory", _open_memory)


def _open_memory(
    details: Mapping[str, Any], shape: tuple[int, int], _: torch.device
) -> tuple[torch.Tensor, None]:
    raw = (ctypes.c_ubyte * (shape[0] * shape[1])).from_address(details["pointer"])
    return torch.frombuffer(raw, dtype=torch.uint8).view(shape), None
