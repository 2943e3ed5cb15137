"""This process's connection to Ray, of which there can be one: to a Ray that runs, or to one of our own.

Our own listens on loopback only, has no dashboard, and a folder that is removed with it. Several clusters share it, and
the last to close stops it. If this process is killed, a small process that waits for its end clears up.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from nanopd_lab.cluster import janitor
from nanopd_lab.cluster.ray_options import RayOptions, head_of
from nanopd_lab.cluster.starter import WorkerStartError

OBJECT_STORE_BYTES = 80 << 20  # about the least that Ray takes: no KV goes there
REACH_S = 5.0
CLEAR_S = 20.0
LONGEST_FOLDER = 40  # characters: Ray's sockets lie below, and a socket's path has 107
_AUTH_MODE = "RAY_AUTH_MODE"  # a Ray of our own turns tokens on for all that this process starts
_LOOPBACK_ONLY = (
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # off elsewhere than on Linux; no nodes but this, no open ports
)


class RaySession:
    """See the module; made by `acquire`."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _current: ClassVar[RaySession | None] = None

    def __init__(self, ray: Any, local: bool, ours: bool, folder: Path | None = None) -> None:
        self.ray = ray
        self.local = local  # our own Ray, or somebody's on this machine alone
        self._ours = ours
        self.folder = folder
        self._users = 0
        self._janitor: subprocess.Popen[bytes] | None = None
        self._auth = os.environ.get(_AUTH_MODE)

    @classmethod
    def acquire(cls, options: RayOptions) -> RaySession:
        """Connect, or start Ray, unless that has been done; `release` it.

        Raises:
            WorkerStartError: Ray is not installed or not reached, or this process belongs to another one already.
        """
        if find_spec("ray") is None:
            raise WorkerStartError("launcher 'ray' needs Ray: pip install 'nanopd-lab[dist]'")
        with cls._lock:
            session = cls._current
            if session is None or not session.ray.is_initialized():
                session = cls._current = _opened(options)
            else:
                session._check_same(options)
            session._users += 1
            return session

    def release(self) -> None:
        """Not needed any more; the last one stops what was started."""
        with RaySession._lock:
            self._users -= 1
            if self._users:
                return
            if RaySession._current is self:
                RaySession._current = None
            if self._ours:
                with suppress(Exception):
                    self.ray.shutdown()
                _set(_AUTH_MODE, self._auth)
                _print_events(self.ray, True)
            if self._janitor is not None and self._janitor.stdin is not None:
                self._janitor.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    self._janitor.wait(CLEAR_S)

    def own_address(self) -> str:
        """Of this machine, as Ray knows it."""
        return str(self.ray.util.get_node_ip_address())

    def _check_same(self, options: RayOptions) -> None:
        here = self.ray.get_runtime_context().gcs_address
        wanted = options.address
        if self.local and self._ours and wanted is None:
            return
        if wanted == "auto" or (wanted is None and not self._ours) or wanted == here:
            return
        raise WorkerStartError(
            f"this process is connected to Ray at {here}, and address is {wanted!r}; one process can use one Ray: "
            "close the clusters that use the other first"
        )

    def watch(self) -> None:
        """Have somebody clear up should this process be killed."""
        if self.folder is not None:
            self._janitor = subprocess.Popen(
                [sys.executable, "-I", "-S", janitor.__file__, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )


def _opened(options: RayOptions) -> RaySession:
    if "ray" not in sys.modules and options.address is None:
        with _loopback_only(None):
            import ray
    else:
        import ray

    if ray.is_initialized():
        session = RaySession(ray, local=False, ours=False)
        session._check_same(options)
        return session
    common = {"namespace": options.namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if options.address is not None:
        _check_reached(options.address)
        with _explained(f"Ray at {options.address}"), _quietly(ray):
            ray.init(address=options.address, _node_ip_address=options.host, **common)
        return RaySession(ray, local=False, ours=True)
    folder = _folder(options.temp_dir)
    session = RaySession(ray, local=True, ours=True, folder=folder)
    session.watch()
    session._users = 1
    try:
        with _explained("a Ray of our own"), _quietly(ray), _loopback_only(ray):
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                **common,
            )
    except BaseException:
        with suppress(Exception):
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        if session._janitor is not None and session._janitor.stdin is not None:
            session._janitor.stdin.close()
        raise
    session._users = 0
    return session


@contextmanager
def _quietly(ray: Any) -> Iterator[None]:
    """Ray takes SIGTERM for itself, and prints what its nodes die of on our standard output; accounts tell it too."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(signal.SIGTERM, before)
        _print_events(ray, False)


def _print_events(ray: Any, wanted: bool) -> None:
    """A private switch of Ray, which may be gone in another version: what it prints is not worth failing for."""
    if hasattr(ray._private.worker, "_worker_logs_enabled"):
        ray._private.worker._worker_logs_enabled = wanted


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        raise WorkerStartError(
            f"{what} cannot be used: {type(error).__name__}: {error}. Is it up (`ray status`), is this machine one of "
            "its nodes (`ray start --address=HOST:PORT`), are Python and Ray of the same version on all of them, and "
            "is RAY_AUTH_MODE=token set here too if that Ray asks for a token?"
        ) from error


def _check_reached(address: str) -> None:
    """Ray itself would try for long."""
    if address == "auto":
        return
    try:
        socket.create_connection(head_of(address), REACH_S).close()
    except OSError as error:
        raise WorkerStartError(
            f"no Ray answers at {address} ({error}); start it with `ray start --head`, which prints its address"
        ) from None


def _folder(inside: str | None) -> Path:
    try:
        folder = Path(tempfile.mkdtemp(prefix="nanopd-ray-", dir=inside))
    except OSError as error:
        raise WorkerStartError(f"temp_dir {inside!r} cannot be used: {error}") from None
    if len(str(folder)) <= LONGEST_FOLDER:
        return folder
    folder.rmdir()
    if inside is None and tempfile.gettempdir() != "/tmp" and Path("/tmp").is_dir():
        return _folder("/tmp")
    raise WorkerStartError(
        f"temp_dir {inside or tempfile.gettempdir()!r} is too long for Ray's sockets by "
        f"{len(str(folder)) - LONGEST_FOLDER} characters; choose a shorter one"
    )


@contextmanager
def _loopback_only(ray: Any) -> Iterator[None]:
    """Meanwhile Ray starts for this machine only. It reads the variable when imported; its processes, when begun."""
    before = os.environ.get(_LOOPBACK_ONLY)
    os.environ[_LOOPBACK_ONLY] = "0"
    constants: Any = None if ray is None else ray._private.ray_constants
    known = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if known is not None:
        constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        if known is not None:
            constants.ENABLE_RAY_CLUSTER = known
        _set(_LOOPBACK_ONLY, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
