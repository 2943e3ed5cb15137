"""Load whose rate can be changed while it runs: Poisson arrivals in an open loop, until somebody stops them.

    load = LiveLoad(cluster, random_requests((Uniform(16, 64), Fixed(16)), cluster.vocab_size), rate=2.0)
    load.start(); load.set_rate(4.0); load.stop()

What a benchmark reports comes from `bench.load`, whose times are all drawn before. This is for looking.
"""

from __future__ import annotations

import enum
import math
import random
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from nanopd_lab.bench.pace import Pace
from nanopd_lab.cluster.actions import ClusterBusyError
from nanopd_lab.cluster.cluster import SETTLE_S, Cluster
from nanopd_lab.core import SamplingParams
from nanopd_lab.engine.prompts import Prompt
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.sim.workload import Sizes

POLL_S = 0.25
MOST_OPEN = 1000  # an open loop that is far too fast must end somewhere
MakeRequest = Callable[[random.Random], tuple[Prompt, SamplingParams]]


def random_requests(lengths: tuple[Sizes, Sizes], vocab_size: int) -> MakeRequest:
    """Random tokens, with (prompt, output) lengths drawn from `lengths`, greedily and to their full length."""

    def make(rng: random.Random) -> tuple[Prompt, SamplingParams]:
        prompt, output = (each.draw(rng) for each in lengths)
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False)
        return [rng.randrange(vocab_size) for _ in range(prompt)], params

    return make


class Phase(str, enum.Enum):
    """Of a load: nothing runs, requests are sent, or what was sent is finished or cancelled."""

    IDLE = "idle"
    RUNNING = "running"
    STOPPING = "stopping"


class LiveLoad:
    """See the module. A thread sends, and has an inline cluster compute, which nobody else may use meanwhile.

    Args:
        cluster: stays usable after; what others submit and poll for is left to them
        make_request: (prompt, sampling parameters), from a random generator
        rate: requests a second; 0: none yet
        drain_s: after `stop`, what has not finished so long after is cancelled
        on_end: called in the load's thread when it is idle again

    Raises:
        ValueError: a rate or a drain that is out of range.
    """

    def __init__(
        self,
        cluster: Cluster,
        make_request: MakeRequest,
        rate: float,
        *,
        seed: int = 0,
        drain_s: float = 5.0,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        if not 0 <= drain_s < math.inf:
            raise ValueError(f"drain_s is {drain_s}; give a finite number of seconds, 0 cancels at once")
        self.cluster = cluster
        self.drain_s = drain_s
        self.phase = Phase.IDLE
        self.error: Exception | None = None  # that has ended the run
        self.refusal: Exception | None = None  # of a request, the last one
        self.sent = self.refused = 0
        self._make_request = make_request
        self._rate = _checked(rate)
        self._rng = random.Random(seed)
        self.during: AbstractContextManager[Any] = nullcontext()  # each run, from before its first request
        self._on_end = on_end
        self._lock = threading.Lock()  # of the phase and of the pace
        self._pace: Pace | None = None
        self._awake = threading.Event()
        self._stop = False
        self._thread: threading.Thread | None = None
        self.lateness: dict[str, float] = {}  # of every request of the run by id, s behind its moment
        self._open: set[str] = set()  # sent and not settled
        self._running: set[str] = set()  # sent and not finished

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self._rate

    def set_rate(self, rate: float) -> None:
        """From now on. Raises ValueError: negative or not finite."""
        with self._lock:
            self._rate = _checked(rate)
        self._awake.set()

    def start(self) -> None:
        """Begin to send.

        Raises:
            ValueError: it runs already, or the cluster is closed.
            RuntimeError: the cluster's controller has stopped.
        """
        with self._lock:
            if self.phase is not Phase.IDLE:
                raise ValueError(f"the load is {self.phase.value} already; stop it first, or wait")
            self.cluster.check_open()
            self.phase, self._stop = Phase.RUNNING, False
            self.error = self.refusal = None
            self.sent = self.refused = 0
            self.lateness.clear()
            self._awake.clear()
            self._thread = threading.Thread(target=self._run, name="nanopd-live-load", daemon=True)
            self._thread.start()

    def ask_to_stop(self) -> None:
        """Send no more; returns at once. Does nothing if it is idle."""
        with self._lock:
            self._stop = True
            if self.phase is Phase.RUNNING:
                self.phase = Phase.STOPPING
        self._awake.set()

    def stop(self) -> None:
        """Send no more, and wait until what was sent has ended, or was cancelled. Does nothing if it is idle.

        Raises:
            RuntimeError: it does not end; the cluster is stuck.
        """
        self.ask_to_stop()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self.drain_s + 3 * SETTLE_S)
            if thread.is_alive():
                raise RuntimeError(
                    f"the load has not ended {self.drain_s + 3 * SETTLE_S:g} s after it was stopped; a step takes "
                    "longer, or the cluster is stuck: close it"
                )

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            # Without an end-of-text token each output is as long as its max_tokens: what no policy may know.
            with self.cluster.alone(), self.during, self.cluster.veiled():
                self._serve()
        except Exception as error:  # it would end this thread only
            self.error = self.error or error
        finally:
            self._open.clear()
            self._running.clear()
            with self._lock:
                self.phase = Phase.IDLE
            self._on_end()

    def _serve(self) -> None:
        drain_s = self.drain_s
        try:
            self._send_all()
        except Exception as error:
            self.error, drain_s = error, 0.0
        self._end_by(drain_s)

    def _send_all(self) -> None:
        clock = self.cluster.clock
        pace = Pace(self._rate, self._rng, clock())
        while not self._stop:
            for moment in pace.due(clock()):
                self._send(moment)
            if pace.rate != self._rate:
                pace.change(self._rate, clock())
            self._collect()
            self._pause(pace.next - clock())

    def _send(self, moment: float) -> None:
        prompt, params = self._make_request(self._rng)
        name = f"live-{moment:.6f}-{len(self.lateness)}"
        try:
            if len(self._open) >= MOST_OPEN:
                raise ClusterBusyError(
                    f"{MOST_OPEN} requests are under way, no more are sent; lower the rate"
                )
            self.lateness[name] = self.cluster.clock() - moment  # known before its end is
            self.cluster.submit(prompt, params, name)
        except (InvalidRequestError, ClusterBusyError) as error:
            self.refused += 1
            self.refusal = error
            return
        self.sent += 1
        self._open.add(name)
        self._running.add(name)

    def _collect(self) -> None:
        """Take the outputs of what was sent; an inline cluster takes a step for it."""
        for output in self.cluster.poll(0.0, self._open):
            if output.finished:
                self._running.discard(output.request_id)
            if output.settled:
                self._open.discard(output.request_id)

    def _pause(self, seconds: float) -> None:
        """Until the next is due; an inline cluster that has something to compute is not kept waiting."""
        if self.cluster.config.launcher == "inline" and self._open:
            return
        self._awake.wait(max(0.0, min(seconds, POLL_S)))
        self._awake.clear()

    def _end_by(self, drain_s: float) -> None:
        """What has not finished so long after is cancelled; then all of it settles."""
        clock = self.cluster.clock
        for limit_s in (drain_s, SETTLE_S):
            deadline = clock() + limit_s
            while self._open and clock() < deadline:
                self._collect()
                self._pause(0.02)
            for name in list(self._running):
                self.cluster.cancel(name)


def _checked(rate: float) -> float:
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate is {rate} requests/s; it must be finite and not negative")
    return float(rate)
