"""A process group of torch.distributed for one ordered pair of workers: gloo between CPUs, NCCL between GPUs.

`torch.distributed.init_process_group` makes one world, whose members are all known beforehand and fail together. Here
every pair has a group of its own, made and dropped at any time: rank 0 sends, rank 1 receives, nobody else is touched
when one of them dies.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanopd_lab.transfer.pull_service import CONNECT_S

_LOOK_S = 2e-5  # between two looks at whether NCCL has ended; it takes a pull's chunk some 100 us
_FOREVER_S = 3600.0


def listening_store(host: str) -> dist.TCPStore:
    """Where the pairs of a source meet: a store that listens on this address only, on a free port.

    By itself a `TCPStore` listens on every address of the machine.
    """
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        None,
        True,
        _seconds(CONNECT_S),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def reached_store(host: str, port: int, seconds: float = CONNECT_S) -> dist.TCPStore:
    """The same from the other side.

    Raises:
        RuntimeError: nobody listens there.
    """
    return dist.TCPStore(host, port, None, False, _seconds(min(seconds, CONNECT_S)), wait_for_workers=False)


class PairGroup:
    """Two ranks. One thread sends or receives; `abort` may be called by another.

    Args:
        store: shared by both, and by no other pair
        rank: 0 sends, 1 receives
        address: of this machine, that the other reaches it at; gloo listens there
        device: of the tensors that travel

    Raises:
        RuntimeError: the other side does not come within `CONNECT_S`.
    """

    def __init__(self, store: dist.Store, rank: int, address: str, device: torch.device) -> None:
        self._other, self._device = 1 - rank, device
        self._aborted, self._aborting = False, threading.Lock()
        # Not behind what the engine has queued on the device's current stream.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._group: Any = _nccl(store, rank) if device.type == "cuda" else _gloo(store, rank, address)

    def send(self, tensor: torch.Tensor) -> dist.Work:
        """Begin; the tensor must live and stay as it is until the work has been waited for."""
        with self._here():
            return self._group.send([tensor], self._other, 0)

    def receive(self, tensor: torch.Tensor) -> dist.Work:
        """Begin; messages arrive in the order in which they were sent."""
        with self._here():
            return self._group.recv([tensor], self._other, 0)

    def _here(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self, work: dist.Work, seconds: float) -> None:
        """Until it has ended.

        Raises:
            RuntimeError: the other side is gone, time is up, or the group was aborted; it cannot be used any more.
        """
        if self._device.type == "cpu":
            work.wait(_seconds(seconds))
            return
        until = time.monotonic() + seconds
        while not work.is_completed():
            if self._aborted or time.monotonic() > until:
                self.abort()
                raise RuntimeError(
                    "aborted" if time.monotonic() < until else f"took more than {seconds:.1f} s"
                )
            time.sleep(_LOOK_S)

    def abort(self) -> None:
        """End what is under way, with an error; no tensor is written any more. Safe to call twice."""
        with self._aborting, suppress(RuntimeError):
            if self._aborted:
                return
            self._aborted = True
            if self._device.type == "cuda":
                self._group.abort()
            else:
                # gloo's own `abort` leaves those alone who wait. But if one operation of a group is late, all end.
                self._group.recv([torch.empty(1)], self._other, 1).wait(timedelta(milliseconds=1))


def _gloo(store: dist.Store, rank: int, address: str) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = _seconds(CONNECT_S)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._threads = 1
    return dist.ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: dist.Store, rank: int) -> Any:
    # A peer that dies is our own affair: torch's watchdog would end the whole process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _seconds(_FOREVER_S)
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=min(max(seconds, 1e-3), _FOREVER_S))
