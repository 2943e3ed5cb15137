"""One life of a worker in a process of its own, and the thread that sends it messages.

What is sent waits there: a worker that is stopped, busy or far away cannot hold the controller up.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from nanopd_lab.cluster.starter import Body
from nanopd_lab.cluster.worker_loop import WorkerSpec
from nanopd_lab.transfer import PoolAddress

SENDER_S = 1.0  # for a thread to see that its connection has ended


@dataclass(eq=False)
class Child:
    """See the module.

    deadline: to be ready, in seconds of `time.monotonic`
    lag_s: how much later than it could each message is sent; tests make a link slow
    """

    spec: WorkerSpec
    body: Body
    deadline: float
    outgoing: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    sender: threading.Thread | None = None
    address: PoolAddress | None = None
    ready: bool = False
    lag_s: float = 0.0

    def begin_to_send(self) -> None:
        """As soon as there is a connection."""
        if self.sender is None and (connection := self.body.connection) is not None:
            name = f"nanopd-to-{self.spec.name}"
            self.sender = threading.Thread(target=self._send_all, args=(connection,), name=name, daemon=True)
            self.sender.start()

    def _send_all(self, connection: Connection) -> None:
        while (message := self.outgoing.get()) is not None:
            batch = [message]
            while not self.outgoing.empty():
                batch.append(self.outgoing.get())
            last = batch[-1] is None
            if self.lag_s:
                time.sleep(self.lag_s)
            with contextlib.suppress(OSError, ValueError):  # it has died; its `end` says so
                connection.send([each for each in batch if each is not None])
            if last:
                return

    def give_up(self) -> None:
        """Kill it, and close the connection once nobody writes there."""
        self.outgoing.put(None)
        self.body.kill()
        if self.sender is not None:
            self.sender.join(SENDER_S)
        if self.body.connection is not None:
            self.body.connection.close()
