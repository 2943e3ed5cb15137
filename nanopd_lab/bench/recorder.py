"""Takes frames of a cluster while it serves, whoever it serves: a load generator, a server, a notebook.

    with Recorder(cluster, slo) as recorder:
        cluster.bench(workload)
    replay(recorder.recording())

A thread looks a few times a second at what the controller knows anyway. It asks no worker, and computes little; what
its looks have cost is in `busy_s`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from nanopd_lab.bench.frames import End, Frame, Rolling, WorkerFrame
from nanopd_lab.bench.recording import Recording
from nanopd_lab.cluster.actions import State
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.looking import Look, WorkerLook
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.router.slo import Slo

INTERVAL_S = 0.25
MOST_FRAMES = 20_000  # more than an hour; then the oldest go
MOST_ENDS = 200_000
JOIN_S = 10.0


class Recorder:
    """See the module.

    Args:
        cluster: any; of a closed one the recording ends
        slo: what requests are judged by
        lateness: by request id, how many seconds before it was submitted it should have been; times count from then
        interval_s: between frames
        window_s: that medians and rates look back over
        title: of the recording; None: the policy and the workers
        on_frame: called in the recorder's thread after each frame; what it raises ends the recording

    Raises:
        ValueError: an interval or a window that is not positive.
    """

    def __init__(
        self,
        cluster: Cluster,
        slo: Slo | None = None,
        *,
        lateness: Mapping[str, float] | None = None,
        interval_s: float = INTERVAL_S,
        window_s: float = 5.0,
        title: str | None = None,
        on_frame: Callable[[Recorder], None] = lambda recorder: None,
    ) -> None:
        if not interval_s > 0 or not window_s > 0:
            raise ValueError(
                f"interval_s is {interval_s} and window_s {window_s}; frames and windows take time: give positive ones"
            )
        self.cluster = cluster
        self.slo = slo or Slo()
        self.lateness = {} if lateness is None else lateness
        self.interval_s = interval_s
        self.window_s = window_s
        self.title = title
        self.frames: deque[Frame] = deque(maxlen=MOST_FRAMES)
        self.ends: deque[End] = deque(maxlen=MOST_ENDS)
        self.error: Exception | None = None
        self.busy_s = 0.0  # of processor time, of the recorder's thread
        self._on_frame = on_frame
        self._completed = self._failed = 0
        self._routes: Counter[str] = Counter()
        self._begun = 0.0
        self._watching: AbstractContextManager[Callable[[], Look]] | None = None
        self._look: Callable[[], Look] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin. Raises ValueError: it has begun before."""
        if self._thread is not None:
            raise ValueError("the recorder has been started before; make a new one")
        self._watching = self.cluster.watched()
        self._look = self._watching.__enter__()
        self._begun = self.cluster.clock()
        self._thread = threading.Thread(target=self._run, name="nanopd-recorder", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last frame and end. Safe to call twice, and before the start."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(JOIN_S)

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def recording(self) -> Recording:
        """So far. Raises ValueError: there is no frame yet."""
        # The thread may append meanwhile; a copy of what is there now is made at once.
        frames, ends = tuple(self.frames), tuple(self.ends)
        config = self.cluster.config
        policy = config.policy if isinstance(config.policy, str) else config.policy.name
        title = self.title or f"{policy}, {config.workers} workers (measured here)"
        return Recording(title, self.slo, self.window_s, frames, ends)

    def _run(self) -> None:
        assert self._watching is not None
        try:
            self._tick()
            while not self._stop.wait(self.interval_s):
                self._tick()
            self._tick()
        except Exception as error:  # the cluster is closed or lost, or the drawing failed
            self.error = error
        finally:
            self._watching.__exit__(None, None, None)

    def _tick(self) -> None:
        begun = time.thread_time()
        assert self._look is not None
        look = self._look()
        now = look.now - self._begun
        for output in look.ended:
            self._take(output)
        sent = self._completed + self._failed + look.running
        rolling = Rolling.of(self._recent(now), self.slo, min(self.window_s, now))
        workers = tuple(map(worker_frame, look.workers))
        self.frames.append(
            Frame(now, look.queued, sent, self._completed, self._failed, dict(self._routes), rolling, workers)
        )
        self._on_frame(self)
        self.busy_s += time.thread_time() - begun

    def _recent(self, now: float) -> list[End]:
        """Those in the window; a request settles a moment after it has ended, so that the order is nearly that of
        time."""
        found = []
        for end in reversed(self.ends):
            if end.time_s <= now - self.window_s:
                break
            found.append(end)
        return found

    def _take(self, output: ClusterOutput) -> None:
        end = end_of(output, self._begun, self.lateness.get(output.request_id, 0.0))
        self.ends.append(end)
        self._completed += end.ok
        self._failed += not end.ok
        self._routes[end.route] += 1


def end_of(output: ClusterOutput, begun: float, late_s: float = 0.0) -> End:
    """What a request got, from `late_s` before it was submitted; of several samples the first one's route and tokens
    count."""
    sample, metrics = output.outputs[0], output.metrics
    ok = all(each.error is None and each.finish_reason != "abort" for each in output.outputs)
    ended = metrics.finished_time if metrics.finished_time is not None else metrics.arrival_time
    route = output.paths[0].route if output.paths else None
    ttft, e2e = (None if each is None else each + late_s for each in (metrics.ttft, metrics.e2e))
    tpot = metrics.tpot(len(sample.token_ids)) or 0.0
    return End(ended - begun, ttft, tpot, e2e, ok, "" if route is None else str(route))


def worker_frame(look: WorkerLook) -> WorkerFrame:
    """For a dashboard. What waits inside a worker is known from its last beat."""
    waiting = min(look.prefilling, look.beat.waiting) if look.beat else 0
    blocks = look.capacity.num_blocks if look.capacity else 0
    return WorkerFrame(
        look.name,
        look.role.value if look.state is State.UP else look.state.value,
        waiting,
        look.prefilling - waiting,
        look.awaited,
        look.decoding,
        blocks - look.beat.blocks_free if look.beat else 0,
        blocks,
    )
