"""A cluster under load, with hands on: start and stop, the rate while it runs, and what that does.

    cockpit = ClusterCockpit(cluster, Slo(ttft_s=0.5, tpot_s=0.1), rate=2.0)
    cockpit                 # buttons and a slider, where there is a front end
    cockpit.run(5)          # five seconds from code, with or without one
    cockpit.replay()        # moment by moment, afterwards

Importing this needs ipywidgets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import ipywidgets

from nanopd_lab.bench.live import LiveLoad, MakeRequest, Phase, random_requests
from nanopd_lab.bench.recorder import INTERVAL_S
from nanopd_lab.bench.recording import Recording
from nanopd_lab.bench.workload import Uniform
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.router.slo import Slo
from nanopd_lab.sim.workload import Sizes
from nanopd_lab.viz.explorer import Explorer
from nanopd_lab.viz.replay import replay
from nanopd_lab.viz.watch import Watch

SHORT = (Uniform(16, 64), Uniform(8, 24))  # tokens of prompts and of outputs


class ClusterCockpit(ipywidgets.VBox):
    """Buttons, a slider for the rate, perhaps a choice of policies, and the dashboard; errors are shown below.

    A thread sends Poisson arrivals in an open loop, and lets an inline cluster compute: nobody else may use that one
    meanwhile. Close the cockpit, or stop it, before the cluster.

    Args:
        lengths: of random prompts and of outputs, as a workload's
        rate, top_rate: requests a second, to begin with and at the slider's end (None: four times as many)
        make_request: instead of random prompts
        policies: to choose of while it stands still, as `Cluster.use_policy` takes them; the cluster's own too
        drain_s: after a stop, what has not finished so long after is cancelled
        window_s, interval_s: as of `Recorder`

    Raises:
        ValueError: a rate, a window or a drain that is out of range.
    """

    def __init__(
        self,
        cluster: Cluster,
        slo: Slo | None = None,
        lengths: tuple[Sizes, Sizes] = SHORT,
        rate: float = 1.0,
        *,
        top_rate: float | None = None,
        make_request: MakeRequest | None = None,
        policies: Sequence[str] = (),
        seed: int = 0,
        drain_s: float = 5.0,
        window_s: float = 5.0,
        interval_s: float = INTERVAL_S,
    ) -> None:
        self.cluster = cluster
        make = make_request or random_requests(lengths, cluster.vocab_size)
        self.load = LiveLoad(cluster, make, rate, seed=seed, drain_s=drain_s, on_end=self._ended)
        self.watch = self.load.during = Watch(
            cluster, slo, window_s=window_s, interval_s=interval_s, lateness=self.load.lateness
        )
        self._lock = threading.Lock()  # callbacks may come in several threads
        top = max(rate, 4 * rate if top_rate is None else top_rate) or 1.0
        self.start_button = ipywidgets.Button(description="Start", button_style="success", icon="play")
        self.start_button.on_click(self._caught(self.start))
        self.stop_button = ipywidgets.Button(description="Stop", button_style="warning", icon="stop")
        self.stop_button.on_click(self._caught(self.load.ask_to_stop))
        self.rate_slider = ipywidgets.FloatSlider(
            value=rate, min=0.0, max=top, step=top / 100, description="requests/s", readout_format=".2f"
        )
        self.rate_slider.observe(self._caught(lambda: self.load.set_rate(self.rate_slider.value)), "value")
        names = list(dict.fromkeys([*self._policy(), *policies]))
        self.policy_choice = ipywidgets.Dropdown(
            options=names, value=next(self._policy(), None), description="policy"
        )
        self.policy_choice.observe(self._caught(self._use_policy), "value")
        self.state = ipywidgets.Label()
        self.error = ipywidgets.Label()
        self.error.add_class("plot-error")
        controls = [self.start_button, self.stop_button, self.rate_slider]
        controls += [self.policy_choice] if len(names) > 1 else []
        super().__init__([ipywidgets.HBox([*controls, self.state]), self.watch, self.error])
        self._show_phase()

    # ------------------------------------------------------------------ from code, and from the buttons

    @property
    def phase(self) -> Phase:
        """Whether it sends, finishes what was sent, or stands still."""
        return self.load.phase

    def start(self) -> None:
        """Send requests, and record.

        Raises:
            ValueError: it runs already, or the cluster is closed.
            RuntimeError: the cluster's controller has stopped.
        """
        self.load.start()
        self.error.value = ""
        self._show_phase()

    def stop(self) -> None:
        """Send no more, and wait until all that was sent has ended or was cancelled. Does nothing if it stands still.

        Raises:
            RuntimeError: the cluster is stuck.
        """
        self.load.stop()

    def run(self, seconds: float) -> Recording:
        """Start, go on for so long, stop; returns what was recorded. An interrupt stops it too.

        Raises:
            ValueError, RuntimeError: as `start`; or what ended the run before its time, as shown.
        """
        self.start()
        try:
            deadline = time.monotonic() + seconds
            while self.phase is not Phase.IDLE and (left := deadline - time.monotonic()) > 0:
                time.sleep(min(left, 0.05))
        finally:
            self.stop()
        if self.load.error is not None:
            raise self.load.error
        return self.recording()

    def recording(self) -> Recording:
        """Of the last run, or of this one so far. Raises ValueError: there is none yet."""
        return self.watch.recording()

    def replay(self) -> Explorer:
        """The last run under a slider. Raises ValueError: there is none yet."""
        return replay(self.recording())

    def close(self) -> None:
        """Stop, and take the widgets away."""
        try:
            if hasattr(self, "load"):  # ipywidgets closes what could not be made, too
                self.stop()
        finally:
            super().close()

    # ------------------------------------------------------------------ inside

    def _policy(self) -> Iterator[str]:
        """The cluster's, if it has a name."""
        if isinstance(self.cluster.config.policy, str):
            yield self.cluster.config.policy

    def _use_policy(self) -> None:
        try:
            if self.policy_choice.value is not None:
                self.cluster.use_policy(self.policy_choice.value)
        except Exception:
            self.policy_choice.value = next(self._policy(), None)
            raise

    def _ended(self) -> None:
        """In the load's thread, when it stands still again."""
        error = self.load.error or self.watch.recorder.error or self.load.refusal
        if error is not None:
            self.error.value = f"{type(error).__name__}: {error}"
        self._show_phase()

    def _show_phase(self) -> None:
        with self._lock:  # whoever comes last has read it last
            phase = self.load.phase
            self.start_button.disabled = phase is not Phase.IDLE
            self.stop_button.disabled = phase is not Phase.RUNNING
            self.policy_choice.disabled = phase is not Phase.IDLE
            self.state.value = phase.value

    def _caught(self, action: Callable[[], None]) -> Callable[[object], None]:
        """For a widget's callback, whose errors would only reach the log console."""

        def call(_: object) -> None:
            try:
                action()
                self._show_phase()
            except Exception as error:
                self.error.value = f"{type(error).__name__}: {error}"

        return call
