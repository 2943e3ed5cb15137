"""All workers in one thread, a turn each: deterministic, for tests and notebooks, with the controller that also runs
over processes.

Messages wait in two queues a worker, as they would in pipes. `step` serves everybody once; a test calls `turn` and
`deliver` in any order it likes, and kills workers between them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from nanopd_lab.cluster.actions import Action, Fence, Send
from nanopd_lab.cluster.controller import Controller
from nanopd_lab.cluster.host import Connect, Disconnect, Findings, StepRecord, WorkerHost
from nanopd_lab.cluster.messages import FromWorker, ToWorker


class InlineLauncher:
    """See the module.

    Args:
        controller: knows the same workers
        start: makes the host of a worker, given its name; called again for a restart
        names: of the workers
        clock: seconds
        max_restarts: of each worker
    """

    def __init__(
        self,
        controller: Controller,
        start: Callable[[str], WorkerHost],
        names: list[str],
        clock: Callable[[], float] = time.monotonic,
        max_restarts: int = 0,
    ) -> None:
        self.controller = controller
        self.clock = clock
        self.names = names
        self.hosts: dict[str, WorkerHost] = {}
        self.inboxes: Mapping[str, deque[ToWorker | Connect | Disconnect]] = {name: deque() for name in names}
        self.outboxes: Mapping[str, deque[FromWorker]] = {name: deque() for name in names}
        self.events: list[Action] = []  # for the caller: Emit and Settled
        self._start = start
        self._restarts = dict.fromkeys(names, max_restarts)
        for name in names:
            self.start(name)
        for name in names:
            self.deliver(name)

    def start(self, name: str) -> None:
        """Bring a worker up and introduce it to the others."""
        host = self.hosts[name] = self._start(name)
        for other, each in self.hosts.items():
            if other != name:
                if host.address is not None:
                    self.inboxes[other].append(Connect(host.address))
                if each.address is not None:
                    self.inboxes[name].append(Connect(each.address))
        self.outboxes[name].append(host.hello())

    def kill(self, name: str, reason: str = "was killed") -> None:
        """A worker is gone, with all that was on its way to and from it; it is restarted if that is allowed."""
        self.hosts.pop(name).close()
        self.inboxes[name].clear()
        self.outboxes[name].clear()
        restart = self._restarts[name] > 0
        self.controller.worker_down(name, reason, self.clock(), restarting=restart)
        self.collect()
        for other in self.hosts:
            self.inboxes[other].append(Disconnect(name))
        if restart:
            self._restarts[name] -= 1
            self.start(name)

    def turn(self, name: str, count: int | None = None) -> None:
        """Give a worker what waits for it (`count` messages at most) and one turn."""
        inbox = self.inboxes[name]
        taken = [inbox.popleft() for _ in range(len(inbox) if count is None else min(count, len(inbox)))]
        self.outboxes[name].extend(self.hosts[name].turn(taken))

    def deliver(self, name: str, count: int | None = None) -> None:
        """Give the controller what a worker has sent, `count` messages at most."""
        outbox = self.outboxes[name]
        for _ in range(len(outbox) if count is None else min(count, len(outbox))):
            self.controller.handle(name, outbox.popleft(), self.clock())
        self.collect()

    def collect(self) -> None:
        """Carry out what the controller has decided."""
        actions, self.controller.actions = self.controller.actions, []
        for action in actions:
            if isinstance(action, Send):
                if action.worker in self.hosts:
                    self.inboxes[action.worker].append(action.message)
            elif isinstance(action, Fence):
                if action.worker in self.hosts:
                    self.kill(action.worker, action.reason)
            else:
                self.events.append(action)

    def step(self) -> list[Action]:
        """Everybody once, in order; returns what there is for the caller."""
        self.controller.tick(self.clock())
        self.collect()
        for name in list(self.hosts):
            if name in self.hosts:
                self.turn(name)
                self.deliver(name)
                self.outboxes[name].append(self.hosts[name].core.beat())
        events, self.events = self.events, []
        return events

    def check(self) -> dict[str, Findings]:
        """What is wrong with each worker."""
        return {name: host.check() for name, host in self.hosts.items()}

    def steps(self) -> dict[str, list[StepRecord]]:
        """Every worker's steps since the last time; empty unless it traces."""
        return {name: host.taken_steps() for name, host in self.hosts.items()}

    def close(self) -> None:
        """Stop all workers."""
        for host in self.hosts.values():
            host.close()
        self.hosts.clear()
