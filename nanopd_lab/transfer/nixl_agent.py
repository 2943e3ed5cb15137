"""NIXL's agent: one end of a pair of workers, which may write into the other's memory, or be written into.

NIXL drives UCX, which takes what both ends have: RDMA, else TCP. Not what writes into another process's memory without
its doing (CMA, XPMEM, CUDA IPC): a source that was stopped and comes back would write there after the reader has given
the blocks to somebody else, and nothing can stop it. An agent that is dropped takes its connections, and its cards'
permission to write, along. Inside a machine `shm` and `p2p` are faster anyway.

What is set here are defaults; UCX_TLS, UCX_NET_DEVICES, UCX_TCP_PORT_RANGE and all else that UCX reads from the
environment go before.

The binding is used as it is, since NIXL's class around it leaves the delay of the progress thread at 0: that thread
then never sleeps, and takes a whole core of an idle process (measured with 1.5.1; with a delay, none).
"""

from __future__ import annotations

import base64
import importlib.util
import os
import socket
import struct
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanopd_lab.transfer.base import TransferError

INSTALL = "pip install 'nanopd-lab[nixl]'"
_PROGRESS_DELAY_US = 100_000  # of the thread that wakes up by itself when there is something to do
_SIOCGIFADDR = 0x8915
_DEFAULTS = {
    "UCX_TLS": "^sm,cuda_ipc",
    # A peer that is gone is told by the pull, not on the terminal; signals stay Python's.
    "UCX_LOG_LEVEL": "fatal",
    "NIXL_LOG_LEVEL": "FATAL",
    "UCX_HANDLE_ERRORS": "none",
}


def is_installed() -> bool:
    """Without importing it."""
    return importlib.util.find_spec("nixl") is not None


def load_bindings() -> Any:
    """NIXL's binding for this build of torch.

    Raises:
        TransferError: it is not installed, or for another CUDA.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import nixl
    except ImportError as error:
        raise TransferError(
            f"transport 'nixl' cannot be loaded: {error}. Install it: {INSTALL} (Linux only), or choose 'torchdist'"
        ) from error
    return nixl._bindings


def interface_of(host: str) -> str | None:
    """The network interface that has this address, None if there is none."""
    import fcntl  # not everywhere, and this module is

    wanted = socket.gethostbyname(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            if socket.inet_ntoa(found[20:24]) == wanted or (name == "lo" and wanted.startswith("127.")):
                return name
    return None


def engine_config(host: str) -> str:
    """UCX's settings: it may listen and connect only where the host's address is.

    Beside InfiniBand or RoCE cards the choice is left to UCX, which joins them with the interfaces by itself; then it
    listens on all of these.
    """
    name = interface_of(host)
    if name == "lo" or (name and not any(Path("/sys/class/infiniband").glob("*"))):
        return f"NET_DEVICES={name}"
    return ""


class Agent:
    """Either end. Used by one thread.

    Args:
        host: address of this machine that the other end reaches it at
        memory: of the own pool; written to, or read, as long as the agent lives
        passive: does not write; what is written here is taken in by a thread of C++. The other end's sends go on while
            it asks whether they have arrived: with such a thread as well it was a fifth slower over TCP, as both wait
            for one lock.

    Raises:
        OSError: UCX does not start, or cannot use this memory.
    """

    def __init__(self, host: str, memory: torch.Tensor, passive: bool) -> None:
        bindings = self._bindings = load_bindings()
        config = bindings.nixlAgentConfig()
        config.useProgThread = passive
        config.pthrDelay = _PROGRESS_DELAY_US
        config.syncMode = bindings.NIXL_THREAD_SYNC_STRICT
        self._memory, self._device = memory, max(memory.get_device(), 0)
        self._kind = bindings.VRAM_SEG if memory.is_cuda else bindings.DRAM_SEG
        self._block_bytes = memory[0].numel() * memory.itemsize
        self._other = ""
        try:
            self._agent = bindings.nixlAgent(uuid.uuid4().hex, config)
            self._backend = self._agent.createBackend("UCX", {"engine_config": engine_config(host)})
            self._check_memory(self._agent.getBackendParams(self._backend)[1])
            row = (memory.data_ptr(), memory.numel() * memory.itemsize, self._device, "")
            self._agent.registerMem(bindings.nixlRegDList(self._kind, [row]), [self._backend])
        except Exception as error:  # the binding's own types have no other base
            raise OSError(f"NIXL's agent does not start: {type(error).__name__}: {error}") from error

    def _check_memory(self, kinds: Sequence[str]) -> None:
        if self._memory.is_cuda and not any("VRAM" in kind for kind in kinds):
            raise RuntimeError(
                f"this UCX handles {', '.join(kinds)} only, not GPU memory; is the driver there, and nixl built for "
                f"torch's CUDA {torch.version.cuda}?"
            )

    @property
    def card(self) -> dict[str, Any]:
        """What the other end must know to write here; JSON."""
        agent = base64.b64encode(self._agent.getLocalMD()).decode()
        return {"agent": agent, "base": self._memory.data_ptr(), "device": self._device}

    def meet(self, card: dict[str, Any]) -> None:
        """Get to know the other end."""
        try:
            self._other = self._agent.loadRemoteMD(base64.b64decode(card["agent"]))
        except Exception as error:
            raise OSError(f"NIXL cannot use what the other end says of itself: {error}") from error
        self._base, self._their_device = card["base"], card["device"]

    def write(self, blocks: Sequence[int], targets: Sequence[int]) -> int:
        """Begin to write blocks of the own pool into those of the other's; a handle for `written`.

        Raises:
            ConnectionError: the other end is gone.
        """
        ours = self._rows(blocks, self._memory.data_ptr(), self._device)
        theirs = self._rows(targets, self._base, self._their_device)
        try:
            handle = self._agent.createXferReq(
                self._bindings.NIXL_WRITE, ours, theirs, self._other, "", [self._backend]
            )
            self._agent.postXferReq(handle)
        except Exception as error:
            raise _gone(error) from error
        return handle

    def written(self, handle: int) -> bool:
        """True once, when all has arrived there.

        Raises:
            ConnectionError: the other end is gone.
        """
        try:
            if self._agent.getXferStatus(handle) == self._bindings.NIXL_IN_PROG:
                return False
            self._agent.releaseXferReq(handle)
        except Exception as error:
            raise _gone(error) from error
        return True

    def _rows(self, blocks: Sequence[int], base: int, device: int) -> Any:
        rows = np.empty((len(blocks), 3), dtype=np.int64)
        rows[:, 0] = base + np.asarray(blocks, dtype=np.int64) * self._block_bytes
        rows[:, 1], rows[:, 2] = self._block_bytes, device
        return self._bindings.nixlXferDList(self._kind, rows)

    def close(self) -> None:
        """When it returns, nothing is written or read any more: UCX's worker and its connections are gone."""
        self._agent = None


def why_not(host: str) -> str:
    """What keeps agents from running at this address of this machine; "" if nothing does. Takes half a second."""
    try:
        Agent(host, torch.zeros(1, 4096, dtype=torch.uint8), passive=False).close()
    except (OSError, TransferError) as error:
        return str(error)
    return ""


def _gone(error: Exception) -> ConnectionError:
    return ConnectionError(f"the other end is gone: {type(error).__name__}: {error}")
